"""The suite: every promise checked, and one error for all that are broken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from normzoo.testing import _autograd, _distributed, _export, _formula, _layout, _memory, _modes, _precision, _torch
from normzoo.testing._promises import Check
from normzoo.testing._running import CheckError, CheckResult, Suite
from normzoo.testing._subject import Factory, Reference, Subject

CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        _formula.signature,
        _layout.ranks,
        _formula.reference,
        _formula.gradcheck,
        _formula.gradgradcheck,
        _layout.channel_dim,
        _layout.memory_format,
        _precision.half_precision,
        _precision.mixed_precision,
        _precision.autocast,
        _formula.large_offset,
        _layout.degenerate,
        _layout.one_value,
        _layout.empty,
        _layout.bad_input,
        _modes.train_eval,
        _modes.batch_dependence,
        _modes.running_statistics,
        _modes.num_batches_tracked,
        _modes.momentum_none,
        _torch.state_dict,
        _torch.copies,
        _torch.meta,
        _torch.functional_call,
        _torch.fx,
        _torch.output_overwritten,
        _torch.input_kept,
        _autograd.checkpointing,
        _autograd.batched_gradients,
        _memory.saved_memory,
        _formula.affine_false,
        _formula.activation,
        _memory.no_host_sync,
        _distributed.sync,
        _export.compile,
        _export.export,
        _export.export_dynamic,
        _export.onnx,
    )
}


class NormCheckError(CheckError):
    """A layer breaks promises; the message has each one in words, and the numbers."""


SUITE = Suite("layer", CHECKS, NormCheckError)


def check_norm(
    factory: str | Factory,
    *,
    num_features: int = 6,
    reference: Reference | None = None,
    exceptions: Mapping[str, str] | None = None,
    checks: Iterable[str] | None = None,
    batch_statistics: bool | None = None,
) -> list[CheckResult]:
    """Hold a normalization layer to every promise of ``CHECKS``.

    Args:
        factory: a registered name such as ``"batch"``, or a callable
            ``factory(num_features, *, ..., device=None, dtype=None)``: a class, or one with options bound, as
            ``normzoo.get_norm("group", groups=2)`` returns it. A registered layer whose default ``groups`` does not
            divide the channels is made with the smallest number above one that does. Inputs are channels first; one
            whose ``channel_dim`` is -1 is made with 1, and the check of that name holds -1 to it.
        num_features: channels of the layers that are made, at least 2.
        reference: ``reference(layer, x) -> y``, the formula written in another way: ``x`` is float64, the layer is in
            training or evaluation and as it was before this input. ``(y, state)`` says as well what the layer holds
            afterwards, by name; names that are left out are not compared.
        exceptions: promises that the layer cannot keep by its nature, as {check: reason}; such a check must fail. By
            default what the registry declares.
        checks: names of the checks to run; by default all, which takes half a minute, most of it in the slow ones:
            ``[n for n, c in CHECKS.items() if not c.slow]`` leaves them out.
        batch_statistics: whether training output depends on the other samples of the batch. By default what the
            registry declares; of other layers it is only asked that evaluation does not, and that one whose samples
            are independent does the same in training as in evaluation.

    Returns:
        one result for each check that was run, in their order.

    Raises:
        NormCheckError: an AssertionError that lists every broken promise with the numbers.
        ValueError: for names that are not in ``CHECKS``, with the nearest that are.

    Example:
        >>> from normzoo.testing import check_norm
        >>> [result.status for result in check_norm("layer", checks=["signature", "momentum_none"])]
        ['passed', 'skipped']
    """
    subject = Subject(factory, num_features, reference, batch_statistics)
    return SUITE.run(subject, checks, _declared(subject, exceptions))


def norm_checks(
    factory: str | Factory,
    *,
    num_features: int = 6,
    reference: Reference | None = None,
    exceptions: Mapping[str, str] | None = None,
    checks: Iterable[str] | None = None,
    batch_statistics: bool | None = None,
) -> Iterator[tuple[str, Callable[[], CheckResult]]]:
    """The checks one by one, for ``pytest.mark.parametrize``; arguments as for :func:`check_norm`.

    Yields:
        (name, check); ``check()`` returns a :class:`CheckResult`, raises :class:`NormCheckError` if the promise is
        broken, and ``unittest.SkipTest``, which pytest reports as skipped, if it does not apply.

    Example:
        >>> for name, check in norm_checks("layer", checks=["signature", "affine_false"]):
        ...     print(name, check().status)
        signature passed
        affine_false passed
    """
    subject = Subject(factory, num_features, reference, batch_statistics)
    return SUITE.one_by_one(subject, checks, _declared(subject, exceptions))


def _declared(subject: Subject, exceptions: Mapping[str, str] | None) -> Mapping[str, str]:
    if exceptions is None:
        return subject.info.exceptions if subject.info else {}
    return exceptions
