"""The formula of every layer as slow, obvious float64 loops, written from the papers and not from the layers.

A reference is called as ``(x, state, options, training)``: x is channels first, the state a dict of the layer's
parameters and buffers by name (weight 1 and bias 0 where it has none), which it moves in place as the layer should.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import NormalDist
from typing import Any

import numpy as np
from torch import nn

State = dict[str, np.ndarray]
Options = Mapping[str, Any]


def moments(v: np.ndarray) -> tuple[float, float]:
    """Mean and biased variance of all values."""
    mean = v.sum() / v.size
    return mean, ((v - mean) ** 2).sum() / v.size


def unbiased(var: float, count: int) -> float:
    """The variance over count - 1; that of a single value counts as 0."""
    return var * count / max(count - 1, 1)


def positions(x: np.ndarray) -> Iterator[tuple[Any, ...]]:
    """Indices of the channels of each sample at each position."""
    for n in range(x.shape[0]):
        for place in np.ndindex(x.shape[2:]):
            yield (n, slice(None), *place)


def blocks(channels: int, groups: int) -> Iterator[slice]:
    """Groups of consecutive channels."""
    size = channels // groups
    for start in range(0, channels, size):
        yield slice(start, start + size)


def scale_shift(y: np.ndarray, s: State) -> np.ndarray:
    out = np.empty_like(y)
    for c in range(y.shape[1]):
        out[:, c] = y[:, c] * s["weight"][c] + s["bias"][c]
    return out


def count_batch(s: State, o: Options) -> float:
    """Count the batch; the update rate for it."""
    s["num_batches_tracked"] += 1
    return 1 / s["num_batches_tracked"] if o["momentum"] is None else o["momentum"]


def move(s: State, name: str, index: Any, value: Any, rate: float) -> None:
    s[name][index] = (1 - rate) * s[name][index] + rate * value


def batch(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    return batch_group(x, s, {**o, "groups": x.shape[1]}, training)


def frozen_batch(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    return batch(x, s, o, training=False)


def batch_group(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    y = np.empty_like(x)
    if not training:
        for c in range(x.shape[1]):
            y[:, c] = (x[:, c] - s["running_mean"][c]) / math.sqrt(s["running_var"][c] + o["eps"])
        return scale_shift(y, s)
    rate = count_batch(s, o)
    for channels in blocks(x.shape[1], o["groups"]):
        v = x[:, channels]
        mean, var = moments(v)
        y[:, channels] = (v - mean) / math.sqrt(var + o["eps"])
        move(s, "running_mean", channels, mean, rate)
        move(s, "running_var", channels, unbiased(var, v.size), rate)
    return scale_shift(y, s)


def ghost_batch(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    if not training:
        return batch(x, s, o, training=False)
    y, rate = np.empty_like(x), count_batch(s, o)
    ghosts = [slice(i, i + o["ghost_size"]) for i in range(0, x.shape[0], o["ghost_size"])]
    for c in range(x.shape[1]):
        means, variances = [], []
        for ghost in ghosts:
            v = x[ghost, c]
            mean, var = moments(v)
            y[ghost, c] = (v - mean) / math.sqrt(var + o["eps"])
            means.append(mean)
            variances.append(unbiased(var, v.size))
        move(s, "running_mean", c, sum(means) / len(ghosts), rate)
        move(s, "running_var", c, sum(variances) / len(ghosts), rate)
    return scale_shift(y, s)


def l1_batch(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    y, rate = np.empty_like(x), count_batch(s, o) if training else 0.0
    for c in range(x.shape[1]):
        v, mean, spread = x[:, c], s["running_mean"][c], math.sqrt(s["running_var"][c])
        if training:
            mean = v.sum() / v.size
            deviation = math.sqrt(math.pi / 2) * np.abs(v - mean).sum() / v.size
            move(s, "running_mean", c, mean, rate)
            s["running_var"][c] = ((1 - rate) * spread + rate * deviation) ** 2
            spread = deviation
        y[:, c] = (v - mean) / (spread + o["eps"])
    return scale_shift(y, s)


def batch_renorm(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    if not training:
        return batch(x, s, o, training=False)
    y = np.empty_like(x)
    r_max, d_max = (float(np.interp(s["num_batches_tracked"], *zip(*o[k], strict=True))) for k in ("r_max", "d_max"))
    rate = count_batch(s, o)
    for c in range(x.shape[1]):
        v, mu, sigma = x[:, c], s["running_mean"][c], math.sqrt(s["running_var"][c] + o["eps"])
        mean, var = moments(v)
        std = math.sqrt(var + o["eps"])
        r = min(max(std / sigma, 1 / r_max), r_max)
        d = min(max((mean - mu) / sigma, -d_max), d_max)
        y[:, c] = (v - mean) / std * r + d
        move(s, "running_mean", c, mean, rate)
        if o["average"] == "std":
            s["running_var"][c] = ((1 - rate) * sigma + rate * std) ** 2 - o["eps"]
        else:
            move(s, "running_var", c, var, rate)
    return scale_shift(y, s)


def iter_norm(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    y, rate = np.empty_like(x), count_batch(s, o) if training else 0.0
    for g, channels in enumerate(blocks(x.shape[1], o["groups"])):
        mean, whitening = s["running_mean"][channels].copy(), s["running_whitening"][g].copy()
        if training:
            values = np.array([x[at][channels] for at in positions(x)])
            mean = values.sum(0) / len(values)
            size = len(mean)
            covariance = sum(np.outer(v - mean, v - mean) for v in values) / len(values) + o["eps"] * np.eye(size)
            trace = sum(covariance[i, i] for i in range(size))
            p = np.eye(size)
            for _ in range(o["iterations"]):
                p = 1.5 * p - 0.5 * p @ p @ p @ (covariance / trace)
            whitening = p / math.sqrt(trace)
            move(s, "running_mean", channels, mean, rate)
            move(s, "running_whitening", g, whitening, rate)
        for at in positions(x):
            y[at][channels] = whitening @ (x[at][channels] - mean)
    return scale_shift(y, s)


def evonorm_b0(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    y, rate = np.empty_like(x), count_batch(s, o) if training else 0.0
    for c in range(x.shape[1]):
        var = s["running_var"][c]
        if training:
            var = moments(x[:, c])[1]
            move(s, "running_var", c, unbiased(var, x[:, c].size), rate)
        for n in range(x.shape[0]):
            std = np.full_like(x[n, c], math.sqrt(var + o["eps"]))
            if o["act_layer"] == "max":
                std = np.maximum(std, s["v"][c] * x[n, c] + math.sqrt(moments(x[n, c])[1] + o["eps"]))
            y[n, c] = x[n, c] / std
    return scale_shift(y, s)


def online(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    y = scale_shift(online_normalized(x, s, o, training)[0], s)
    if o["compensation"] == "clamp":
        return np.clip(y, -o["clamp_value"], o["clamp_value"])
    if o["compensation"] == "layer":
        for n in range(x.shape[0]):
            y[n] = y[n] / math.sqrt((y[n] ** 2).sum() / y[n].size + 1e-5)
    return y


def online_normalized(x: np.ndarray, s: State, o: Options, training: bool) -> tuple[np.ndarray, np.ndarray]:
    """The normalized samples and the deviations, (N, C), that they were divided by."""
    z, stds = np.empty_like(x), np.empty(x.shape[:2])
    mean, var, rate = s["running_mean"], s["running_var"], o["momentum"]
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            stds[n, c] = math.sqrt(var[c] + o["eps"])
            z[n, c] = (x[n, c] - mean[c]) / stds[n, c]
            if training:
                of_sample, var_of_sample = moments(x[n, c])
                step = of_sample - mean[c]
                var[c] = (1 - rate) * var[c] + rate * var_of_sample + rate * (1 - rate) * step**2
                mean[c] += rate * step
    return z, stds


def power(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    return scale_shift(power_normalized(x, s, o, training)[0], s)


def power_normalized(x: np.ndarray, s: State, o: Options, training: bool) -> tuple[np.ndarray, np.ndarray]:
    """The normalized batch and each channel's own quadratic mean."""
    scaled = group_scaled(x, o["groups"], o["eps"])
    z, q = np.empty_like(x), np.empty(x.shape[1])
    rate = count_batch(s, o) if training else 0.0
    step = s["num_batches_tracked"]
    for c in range(x.shape[1]):
        phi, v = s["running_phi"][c], scaled[:, c]
        q[c] = (v**2).sum() / v.size
        warm = training and step <= o["warmup"]
        z[:, c] = v / math.sqrt((q[c] if warm else phi) + o["eps"])
        if training and step < o["warmup"] and o["momentum"] is not None:
            phi = phi * (step - 1) / step + q[c] / step
        s["running_phi"][c] = (1 - rate) * phi + rate * q[c]
    return z, q


def group_scaled(x: np.ndarray, groups: int | None, eps: float) -> np.ndarray:
    """Each position of groups of channels by its root mean square."""
    y = x.copy()
    if groups is not None:
        for at in positions(x):
            for channels in blocks(x.shape[1], groups):
                v = x[at][channels]
                y[at][channels] = v / math.sqrt((v**2).sum() / v.size + eps)
    return y


def group(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    return scale_shift(group_normalized(x, o["groups"], o["eps"]), s)


def group_normalized(x: np.ndarray, groups: int, eps: float) -> np.ndarray:
    y = np.empty_like(x)
    for n in range(x.shape[0]):
        for channels in blocks(x.shape[1], groups):
            mean, var = moments(x[n, channels])
            y[n, channels] = (x[n, channels] - mean) / math.sqrt(var + eps)
    return y


def layer(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    return group(x, s, {**o, "groups": 1}, training)


def instance(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    return group(x, s, {**o, "groups": x.shape[1]}, training)


def layer_channel(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    y = np.empty_like(x)
    for at in positions(x):
        mean, var = moments(x[at])
        var = unbiased(var, x.shape[1]) if o.get("unbiased") else var
        y[at] = (x[at] - mean) / math.sqrt(var + o["eps"])
    return scale_shift(y, s)


positional = layer_channel


def rms(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    return scale_shift(group_scaled(x, 1, o["eps"]), s)


def filter_response(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    y = np.empty_like(x)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            y[n, c] = x[n, c] / math.sqrt((x[n, c] ** 2).sum() / x[n, c].size + o["eps"])
    y = scale_shift(y, s)
    if o["act_layer"] == "tlu":
        for c in range(x.shape[1]):
            y[:, c] = np.maximum(y[:, c], s["tau"][c])
    return y


def evonorm_s0(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    y = np.empty_like(x)
    for n in range(x.shape[0]):
        for channels in blocks(x.shape[1], o["groups"]):
            y[n, channels] = x[n, channels] / math.sqrt(moments(x[n, channels])[1] + o["eps"])
    if o["act_layer"] == "gate":
        for c in range(x.shape[1]):
            y[:, c] *= logistic(s["v"][c] * x[:, c])
    return scale_shift(y, s)


def logistic(v: np.ndarray) -> np.ndarray:
    return (1 + np.tanh(v / 2)) / 2


def local_response(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    y, channels, size = np.empty_like(x), x.shape[1], o["size"]
    alpha = o["alpha"] / size if o["mean"] else o["alpha"]
    for c in range(channels):
        near = range(max(0, c - size // 2), min(channels, c + (size - 1) // 2 + 1))
        squares = sum(x[:, i] ** 2 for i in near)
        y[:, c] = x[:, c] / (o["k"] + alpha * squares) ** o["beta"]
    return scale_shift(y, s)


def divisive(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    v, y = np.empty_like(x), np.empty_like(x)
    sigma = s["sigma"][0] if o["learn_sigma"] else o["sigma"]
    for n in range(x.shape[0]):
        # All channels are in the pool; without space the window slides over the channels instead.
        pooled = x[n] if x.ndim == 2 else x[n].mean(0)
        v[n] = x[n] - window_mean(pooled, o["mean_window"])
        power = v[n] ** 2 if x.ndim == 2 else (v[n] ** 2).mean(0)
        y[n] = v[n] / np.sqrt(sigma**2 + window_mean(power, o["square_window"]))
    return scale_shift(y, s)


def window_mean(x: np.ndarray, size: int) -> np.ndarray:
    """Around each value; zeros beyond the border count, and an even window reaches one further ahead."""
    y, before = np.zeros_like(x), (size - 1) // 2
    for at in np.ndindex(x.shape):
        window = tuple(slice(max(0, i - before), i - before + size) for i in at)
        y[at] = x[window].sum() / size**x.ndim
    return y


def switchable(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    y, (samples, channels) = np.empty_like(x), x.shape[:2]
    of_mean, of_var, space = softmax(s["mean_weight"]), softmax(s["var_weight"]), x[0, 0].size
    mean, square = np.empty((samples, channels)), np.empty((samples, channels))
    for n in range(samples):
        for c in range(channels):
            mean[n, c], var = moments(x[n, c])
            var = unbiased(var, space) if o["unbiased_instance"] else var
            square[n, c] = var + mean[n, c] ** 2  # from which the others follow: they inherit an unbiased variance
    layer_mean, batch_mean = mean.sum(1) / channels, s["running_mean"].copy()
    layer_var, batch_var = square.sum(1) / channels - layer_mean**2, s["running_var"].copy()
    if training:
        rate = count_batch(s, o)
        batch_mean = mean.sum(0) / samples
        batch_var = square.sum(0) / samples - batch_mean**2
        move(s, "running_mean", slice(None), batch_mean, rate)
        move(s, "running_var", slice(None), batch_var, rate)
    for n in range(samples):
        for c in range(channels):
            m = of_mean @ [mean[n, c], layer_mean[n], batch_mean[c]]
            v = of_var @ [square[n, c] - mean[n, c] ** 2, layer_var[n], batch_var[c]]
            y[n, c] = (x[n, c] - m) / math.sqrt(v + o["eps"])
    return scale_shift(y, s)


def softmax(v: np.ndarray) -> np.ndarray:
    return np.exp(v) / np.exp(v).sum()


def batch_instance(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    of_batch, of_instance = batch_and_instance(x, s, o, training)
    y = np.empty_like(x)
    for c in range(x.shape[1]):
        gate = min(max(s["gate"][c], 0.0), 1.0)
        y[:, c] = gate * of_batch[:, c] + (1 - gate) * of_instance[:, c]
    return scale_shift(y, s)


def batch_and_instance(x: np.ndarray, s: State, o: Options, training: bool) -> tuple[np.ndarray, np.ndarray]:
    """The two that the gate weighs."""
    ones = {"weight": np.ones(x.shape[1]), "bias": np.zeros(x.shape[1])}
    return batch(x, {**s, **ones}, o, training), group_normalized(x, x.shape[1], o["eps"])


def proxy(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    y = scale_shift(group_normalized(x, o["groups"], o["eps"]), s)
    act = ACTIVATIONS[o["act_layer"]]
    normal = [NormalDist().inv_cdf((i + 0.5) / o["samples"]) for i in range(o["samples"])]
    for c in range(x.shape[1]):
        stand_in = [(1 + s["proxy_weight"][c]) * r + s["proxy_bias"][c] for r in normal]
        mean, var = moments(np.array([act(s["weight"][c] * p + s["bias"][c]) for p in stand_in]))
        y[:, c] = (act(y[:, c]) - mean) / math.sqrt(var + o["proxy_eps"])
    return y


ACTIVATIONS = {None: lambda v: v, nn.ReLU: lambda v: v * (v > 0), nn.SiLU: lambda v: v * logistic(v)}


def none(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    return scale_shift(x, s)


affine = none


def dynamic_tanh(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    return scale_shift(np.tanh(s["alpha"][0] * x), s)


def derf(x: np.ndarray, s: State, o: Options, training: bool) -> np.ndarray:
    y = np.empty_like(x)
    for at in np.ndindex(x.shape):
        y[at] = math.erf(s["alpha"][0] * x[at] + s["shift"][0])
    return scale_shift(y, s)
