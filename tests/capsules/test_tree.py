"""Trees as JSON and tensors, and back."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import random
import struct
from collections import Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sweeps import EXAMPLES
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from normzoo.capsules import tensors as of_torch
from normzoo.capsules.tree import MAX_DEPTH, LeftOut, decode, encode

DTYPES = [*of_torch.DTYPES, *sorted(of_torch._AS_BYTES, key=str)]
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
Pair = namedtuple("Pair", "first second")


def through_json(tree: Any) -> tuple[Any, dict[str, Tensor], dict[str, str]]:
    """The tree after the way to the disk, with tensors that are contiguous as those of a file."""
    skeleton, dense, left_out = encode(tree)
    assert {tensor.dtype for tensor in dense.values()} <= {*of_torch.DTYPES}
    stored = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in dense.items()}
    text = json.dumps(skeleton, allow_nan=False)
    return decode(json.loads(text), partial(of_torch.leaf, load=stored.__getitem__)), stored, left_out


def returned(tree: Any) -> Any:
    decoded, _, left_out = through_json(tree)
    assert left_out == {}
    return decoded


def bits(tensor: Tensor) -> bytes:
    """Values in the order of indices."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype.itemsize == 1:  # torch cannot copy all of these dtypes with deterministic algorithms
        tensor = tensor.view(torch.uint8)
    flat = tensor.clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_same(a: Any, b: Any) -> None:
    """Of the same class and bit for bit the same."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert len(a) == len(b)
        for (key, value), (other_key, other) in zip(a.items(), b.items(), strict=True):
            assert_same(key, other_key)
            assert_same(value, other)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for value, other in zip(a, b, strict=True):
            assert_same(value, other)
    elif isinstance(a, float):
        assert struct.pack("d", a) == struct.pack("d", b)
    elif isinstance(a, Tensor):
        assert (a.dtype, a.shape, a.requires_grad, bits(a)) == (b.dtype, b.shape, b.requires_grad, bits(b))
    elif isinstance(a, np.ndarray | np.generic):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    else:
        assert a == b


def make_tensor(dtype: torch.dtype, shape: list[int], seed: int, requires_grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    tensor = raw.view(dtype).reshape(shape)
    return tensor.requires_grad_(requires_grad and dtype.is_floating_point and dtype.itemsize > 1)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Tensors of random bits, of any strides."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    tensor = make_tensor(dtype, shape, draw(st.integers(0, 9)), draw(st.booleans()))
    for _ in range(draw(st.integers(0, 3))):
        if tensor.dim() == 0:
            break
        dim = draw(st.integers(0, tensor.dim() - 1))
        view = draw(st.sampled_from(["permuted", "with gaps", "expanded", "channels last"]))
        if view == "permuted":
            tensor = tensor.permute(draw(st.permutations(range(tensor.dim()))))
        elif view == "with gaps" and tensor.shape[dim]:
            tensor = tensor.narrow(dim, tensor.shape[dim] // 2, (tensor.shape[dim] + 1) // 2)
        elif view == "expanded" and tensor.shape[dim]:
            shape = list(tensor.shape)
            shape[dim] = 3
            tensor = tensor.narrow(dim, 0, 1).expand(shape)
        elif view == "channels last" and tensor.dim() == 4 and dtype in of_torch.DTYPES:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(2**52, 2**70),
    st.floats(),
    st.text(st.characters()),
    st.sampled_from(["$tensor", "$", "__metadata__", "/", "a/b"]),
)
leaves = st.one_of(
    scalars,
    st.binary(max_size=20),
    tensors(),
    hnp.arrays(
        hnp.scalar_dtypes().filter(lambda dtype: dtype.kind != "V"),
        hnp.array_shapes(min_dims=0, min_side=0, max_side=3),
    ),
    hnp.scalar_dtypes().flatmap(hnp.from_dtype).filter(lambda value: isinstance(value, np.generic)),
    st.sampled_from([torch.float32, torch.device("cuda:1"), torch.Size([2, 3]), torch.Size([])]),
)
keys = st.recursive(scalars, lambda inner: st.lists(inner, max_size=2).map(tuple), max_leaves=3)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=3).map(tuple), st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)


def hold_round_trip(examples: int) -> None:
    @settings(max_examples=examples)
    @given(trees)
    def property_holds(tree: Any) -> None:
        assert_same(plain_numpy_text(tree), returned(tree))

    property_holds()


def plain_numpy_text(tree: Any) -> Any:
    """NumPy's str_ and bytes_ come back as the text and the bytes that they are."""
    if isinstance(tree, np.str_):
        return str(tree)
    if isinstance(tree, np.bytes_):
        return bytes(tree)
    if isinstance(tree, dict):
        return {key: plain_numpy_text(value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map(plain_numpy_text, tree))
    return tree


def test_a_tree_comes_back_bit_for_bit() -> None:
    hold_round_trip(60)


@pytest.mark.slow
def test_many_trees_come_back_bit_for_bit() -> None:
    hold_round_trip(EXAMPLES)


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype(dtype: torch.dtype, deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic)
    tensor = make_tensor(dtype, [3, 4], 0)
    tree = {
        "scalar": tensor[0, 0],
        "empty": tensor[:0],
        "whole": tensor,
        "transposed": tensor.t(),
        "column": tensor[:, 1],
    }
    assert_same(tree, returned(tree))


def test_strides_of_dense_tensors_are_kept() -> None:
    images = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    tree = [images, torch.randn(3, 4).t(), torch.randn(2, 3, 4).permute(1, 2, 0), torch.randn(4, 1).expand(4, 1000)]
    for tensor, again in zip(tree, returned(tree), strict=True):
        assert again.stride() == tensor.stride()


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=5).flatmap(
        lambda shape: st.tuples(
            st.just(shape),
            st.permutations(range(len(shape))),
            st.lists(st.integers(0, 99), min_size=len(shape), max_size=len(shape)),
        )
    )
)
def test_strides_of_dimensions_of_size_1_are_kept(drawn: tuple[list[int], list[int], list[int]]) -> None:
    """A kernel may go by them: images of one channel are channels-last or not."""
    shape, order, strides = drawn
    tensor = torch.randn([shape[dim] for dim in order]).permute([order.index(dim) for dim in range(len(shape))])
    strides = [new if size == 1 else old for new, old, size in zip(strides, tensor.stride(), shape, strict=True)]
    tensor = tensor.as_strided(shape, strides)
    again = returned(tensor)
    assert_same(tensor, again)
    assert again.stride() == tensor.stride()


def test_expanded_tensors_are_stored_once() -> None:
    [stored] = through_json(torch.ones(3, 1, 2).expand(3, 10**9, 2))[1].values()
    assert stored.numel() == 6


def test_aliases_are_stored_once_and_are_aliases_again() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    array = np.arange(6.0)
    tree = {
        "w": weight,
        "tied": weight,
        "data": weight.detach(),
        "t": weight.t(),
        "arrays": [array, array],
        "row": weight[1],
    }
    again, stored, _ = through_json(tree)
    assert [*stored] == ["/w", "/arrays/0", "/row"]
    assert again["w"].requires_grad
    assert not again["data"].requires_grad
    again["data"][0, 1] = 7.0
    assert again["w"][0, 1] == again["tied"][0, 1] == again["t"][1, 0] == 7.0


def test_what_is_encoded_is_not_copied() -> None:
    weight = torch.randn(3, 4)
    encoded = encode([weight.t()])
    assert encoded.tensors["/0"].data_ptr() == weight.data_ptr()


def test_nan_keeps_its_bits_and_numbers_their_size() -> None:
    nans = [struct.unpack(">d", bytes.fromhex(text))[0] for text in ("7ff8000000000000", "fff8000000000001")]
    tree = [*nans, math.inf, -math.inf, -0.0, 5e-324, 2**53, -(2**53) - 1, 10**5000, True, 1, 1.0]
    assert_same(tree, returned(tree))


class Colour(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


@dataclasses.dataclass
class Batch:
    images: Any
    size: int = dataclasses.field(init=False)


def test_dataclasses_come_back_as_dictionaries() -> None:
    [again] = returned([Batch([1, 2])])
    assert again == {"images": [1, 2]}
    assert encode(Batch(3)).skeleton == {"$dict": [("images", 3)], "class": f"{__name__}.Batch"}


def test_containers_of_other_classes_come_back_as_what_they_are_based_on() -> None:
    tree = {
        "ordered": OrderedDict(b=1, a=2),
        "default": defaultdict(list, x=[1]),
        "user": UserDict({"ids": [1]}),
        "counter": Counter("aab"),
        "pair": Pair(1, [2]),
        "window": deque([1, 2], maxlen=3),
        "sets": [{1}, frozenset({(1, 2)})],
        "enums": [Colour.RED, Level.HIGH, {Colour.RED: 1}],
        "memory": np.str_("x"),
    }
    again = returned(tree)
    assert again == {
        "ordered": {"b": 1, "a": 2},
        "default": {"x": [1]},
        "user": {"ids": [1]},
        "counter": {"a": 2, "b": 1},
        "pair": (1, [2]),
        "window": [1, 2],
        "sets": [{1}, frozenset({(1, 2)})],
        "enums": ["red", 3, {"red": 1}],
        "memory": "x",
    }
    assert {type(again[key]) for key in ("ordered", "default", "user", "counter")} == {dict}
    assert [type(x) for x in again["enums"][:2]] == [str, int]
    skeleton = encode(tree).skeleton
    assert skeleton["pair"]["class"] == f"{Pair.__module__}.Pair"
    assert skeleton["user"]["class"] == "collections.UserDict"


def test_states_of_generators_come_back() -> None:
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    new = {"numpy": np.random.default_rng(3).bit_generator.state}
    assert_same(states, returned(states))
    assert_same(new, returned(new))
    random.setstate(returned(states)["python"])


class Model(nn.Module):
    pass


def freed() -> Tensor:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (lambda: 1, "function"),
        (object(), "object"),
        (1j, "complex"),
        (Model(), f"{__name__}.Model"),
        (torch.Generator(), "torch._C.Generator"),
        (torch.eye(2).to_sparse(), r"torch.Tensor of the layout torch.sparse_coo"),
        (torch.ones(2, device="meta"), "torch.Tensor without values, on the meta device"),
        (freed(), "torch.Tensor whose memory is freed"),
        (nn.LazyLinear(2).weight, "torch.nn.parameter.UninitializedParameter without values yet"),
        (np.array([object()]), "numpy.ndarray of object"),
        (np.zeros(2, dtype=[("a", "f4")]), "numpy.ndarray of [('a', '<f4')]"),
        (np.ma.masked_array([1.0]), "numpy.ma.MaskedArray of float64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_kept_is_left_out_by_its_path(value: Any, reason: str) -> None:
    again, _, left_out = through_json({"kept": 1, "a": [0, {"b": value}]})
    assert again == {"kept": 1, "a": [0, {"b": LeftOut(reason)}]}
    assert left_out == {"/a/1/b": reason}


def test_tensors_on_a_device_that_has_failed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an assertion in a kernel of CUDA; it is asked once."""
    asked = []

    def fail(tensor: Tensor) -> Tensor:
        asked.append(tensor)
        raise RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors might be reported")

    monkeypatch.setattr(Tensor, "cpu", fail)
    skeleton, stored, left_out = encode({"a": torch.ones(2), "b": torch.ones(3), "step": 3})
    assert (skeleton["step"], stored, len(asked)) == (3, {}, 1)
    assert set(left_out) == {"/a", "/b"}
    assert left_out["/a"].startswith("a tensor on cpu, which cannot be read: CUDA error: device-side assert triggered")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_tensors_are_left_out() -> None:
    quantized = torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.quint8)
    assert [*through_json([quantized])[2].values()] == ["torch.Tensor of torch.quint8"]


def test_nested_tensors_are_left_out() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    [reason] = through_json([nested])[2].values()
    assert "NestedTensor, a class that wraps other tensors" in reason


def test_keys_that_are_objects_are_left_out() -> None:
    again, _, left_out = through_json({"a": {len: 1, "b": 2}, 3: object(), (1, "x"): object()})
    assert again == {"a": {"b": 2}, 3: LeftOut("object"), (1, "x"): LeftOut("object")}
    assert left_out == {
        "/a/builtin_function_or_method": "builtin_function_or_method as a key",
        "/3": "object",
        "/(1, x)": "object",
    }


def test_paths_that_read_the_same_are_told_apart() -> None:
    tree = {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}, 1: object(), "1": object()}
    again, stored, left_out = through_json(tree)
    assert [*stored] == ["/a/b", "/a/b~"]
    assert [*left_out] == ["/1", "/1~"]
    assert (again["a/b"].item(), again["a"]["b"].item()) == (1.0, 0.0)


def test_circles_and_depths_end() -> None:
    circle: dict[str, Any] = {"x": 1}
    circle["self"] = [circle]
    again, _, left_out = through_json(circle)
    assert again == {"x": 1, "self": [LeftOut("dict that contains itself")]}
    assert left_out == {"/self/0": "dict that contains itself"}
    deep: Any = 1
    for _ in range(10_000):
        deep = {(1, 2): (deep,)}
    [reason] = through_json(deep)[2].values()
    assert reason == f"dict more than {MAX_DEPTH} levels deep"
    twice = [1]
    assert returned([twice, twice]) == [[1], [1]]


def test_endless_repetition_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """As lists that contain the same list twice each, which would be 2^60 numbers."""
    monkeypatch.setattr("normzoo.capsules.tree._LONGEST", 20_000)
    doubled: Any = [0]
    for _ in range(60):
        doubled = [doubled, doubled]
    skeleton, _, left_out = encode([doubled, "x" * 30_000, list(range(2000)), torch.ones(2), "kept"])
    assert len(json.dumps(skeleton)) < 400_000
    assert "text of 30000 characters" in encode(["x" * 30_000]).left_out.values()
    assert encode([list(range(2000))]).left_out == {"/0": "list of 2000 items"}
    assert left_out


def test_of_a_dtensor_there_is_the_part_of_the_rank() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        local = torch.randn(2, 3)
        sharded = nn.Parameter(DTensor.from_local(local, init_device_mesh("cpu", (1,)), [Shard(0)]))
        skeleton = encode([sharded]).skeleton
        assert skeleton == [{"$tensor": "/0", "requires_grad": True, "placements": ["S(0)"], "global_shape": [2, 3]}]
        [again] = returned([sharded])
        assert type(again) is Tensor
        assert torch.equal(again, local)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "skeleton",
    [
        {"$object": "os.system"},
        {"$dtype": "nn"},
        {"$dtype": "__class__"},
        {"$device": "nowhere"},
        {"$device": [1]},
        {"$size": ["a"]},
        {"$size": "ab"},
        {"$int": "z"},
        {"$int": 3},
        {"$float": "zz"},
        {"$float": "ff" * 9},
        {"$scalar": ["O", "00" * 8]},
        {"$scalar": ["<f4", "00"]},
        {"$scalar": ["f4,f4", "00" * 8]},
        {"$scalar": ["not a dtype", "00"]},
        {"$scalar": 3},
        {"$dict": [[[1], 2]]},
        {"$dict": [[1, 2, 3]]},
        {"$dict": 3},
        {"$set": [[1]]},
        {"$tuple": 3},
        {"$tensor": "nowhere"},
        {"$tensor": ["a"]},
        {"$tensor": "a", "order": [0, 0, 5]},
        {"$tensor": "a", "order": "01"},
        {"$tensor": "a", "shape": [7, 7]},
        {"$tensor": "a", "strides": [10**9]},
        {"$tensor": "a", "strides": "123"},
        {"$tensor": "a", "strides": [True] * 9},
        {"$tensor": "a", "shape": [10**30, 3]},
        {"$tensor": "a", "dtype": "load"},
        {"$tensor": "a", "dtype": "complex128", "dense_shape": [5]},
        {"$tensor": "whole", "requires_grad": True},
        {"$array": "a", "dtype": "O", "dense_shape": [1]},
        {"$array": "a", "dtype": "<f8", "dense_shape": [-1, -3]},
        {"$array": "a", "dtype": "<f8", "dense_shape": [10**12]},
        {"$array": "a", "dtype": "<f8"},
        {"$bytes": None},
    ],
    ids=str,
)
def test_other_skeletons_are_refused(skeleton: Any) -> None:
    stored = {"a": torch.zeros(2, 3), "whole": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"."):
        decode([skeleton], partial(of_torch.leaf, load=stored.__getitem__))


def test_absurd_depth_is_refused() -> None:
    skeleton: Any = 1
    for _ in range(MAX_DEPTH + 1):
        skeleton = [skeleton]
    with pytest.raises(ValueError, match=f"more than {MAX_DEPTH} levels deep"):
        decode(skeleton, lambda tag, about: None)
