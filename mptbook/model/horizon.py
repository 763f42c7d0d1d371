"""The horizon of a head: the distance beyond which no key can change its output.

ALiBi takes slope * d from the score of a key at distance d. What the content of queries and
keys can add to a score is bounded; beyond some distance the bias outweighs it, and what lies
there can be left out, with a proven bound on the error.

Dimensions in this file
    B   batch
    H   query heads;  G  key and value heads, a divisor of H
    Tq  query positions
    Tk  key positions
    K   width of a head
    D   width of the residual stream
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mptbook.model.attention import Attention, backend, choose
from mptbook.model.norms import Norm
from mptbook.model.reference import check
from mptbook.model.windows import windowed

UNBOUNDED = 2**62  # the window of a head without a slope


def horizons(slopes: Tensor, ranges: Tensor, error: float) -> Tensor:
    """How many keys each head needs, its own position among them.

    **Claim.** Let m > 0 be the slope of a head and r its range, from `static_ranges` or
    `measured_ranges`. If every query sees only the w = ceil(log(1 + exp(r) / error) / m) keys
    at distances 0 to w - 1, each number of its output changes by less than ``error`` times the
    spread of the values: the largest less the smallest value in that channel among all the
    keys it saw before.

    **Proof.** Let kept and dropped be the sums of exp(score - m d) over the distances d < w and
    d >= w. Say every score lies between -R and R, so that r = 2 R; `measured_ranges` has the
    other case. Then

        dropped <= exp(R) * (exp(-m w) + exp(-m (w + 1)) + ...) = exp(R - m w) / (1 - exp(-m)).

    If a key is dropped, all w nearer ones were there, so

        kept >= exp(-R) * (1 + exp(-m) + ... + exp(-m (w - 1)))
              = exp(-R) * (1 - exp(-m w)) / (1 - exp(-m)).

    The quotient x = dropped / kept is at most exp(r) / (exp(m w) - 1), which is ``error`` or
    less for the w above. The full output is (kept * a + dropped * b) / (kept + dropped), where a
    and b are weighted means of the values kept and dropped, and a is the output within the
    window. They differ by |b - a| * x / (1 + x), less than ``error`` times the spread. QED.

    The softmax does not see a number added to all scores of a query, so the scores may be those
    after taking the same vector from every key. Within a document the proof is the same. By the
    same steps the errors in the gradients of the scores of a query add up to at most
    3 * error times the spread of (gradient of its output) . v.

    Args:
        slopes: (H,) float32, nats per token.
        ranges: (H,), r of each head, in nats.
        error: above 0; see `tolerance`.

    Returns:
        (H,) int64, at least 1 / m; 2 ** 62 for a head without a slope, which has no horizon.
    """
    if not error > 0:
        raise ValueError(f"error is {error}; a horizon needs a tolerance above 0")
    slopes, ratio = slopes.double(), ranges.double() - math.log(error)
    reach = F.softplus(ratio, threshold=40)  # log(1 + exp(r) / error)
    reach = reach.nan_to_num(nan=math.inf)  # where scores are not numbers, all keys count
    return (reach.clamp(min=1) / slopes).ceil().clamp(max=UNBOUNDED).long()


def tolerance(dtype: torch.dtype) -> float:
    """The error of a horizon that is lost in the rounding of `dtype`: an eighth of its step.

    An output of the size of the values is rounded by up to half a step.
    """
    return torch.finfo(dtype).eps / 8


@torch.no_grad()
def measured_ranges(q: Tensor, k: Tensor, slopes: Tensor, scale: float) -> Tensor:
    """The range r of each head, as `horizons` needs it, from the queries and keys at hand.

    Taking the mean key c from every key changes no weight, and trained keys have much in
    common. Then no score of a query is above R = scale * |q| * max |k - c|. From below, its
    nearest n = ceil(1 / m) keys do better than -R: the mean of exp is at least exp of the mean,
    so

        kept >= exp(s_0) + ... + exp(s_(n-1) - m (n - 1)) >= n * exp(s - m (n - 1) / 2)

    where s is the mean of their scores, scale * q . (their mean - c). With the bound on what is
    dropped from `horizons`, dropped / kept <= exp(r - m w) for the query, with
    r = R - s + m (n - 1) / 2 - log(n * (1 - exp(-m))). The largest r of all queries counts; one
    with fewer than n keys before it drops none.

    Args:
        q: (B, H, Tq, K).
        k: (B, G, Tk, K).
        slopes: (H,) float32.
        scale: factor of the scores.

    Returns:
        (H,) float64, in nats.
    """
    n_keys, past = k.shape[2], k.shape[2] - q.shape[2]
    copies = q.shape[1] // k.shape[1]
    ranges = []
    for head, slope in enumerate(slopes.tolist()):
        if head % copies == 0:  # one at a time: a float32 copy of all keys is large
            keys = k[:, head // copies].float()
            keys = keys - keys.mean(1, keepdim=True)
            longest = torch.linalg.vector_norm(keys, dim=2).amax(1, keepdim=True)  # (B, 1)
            # Sums of the keys before each; float32 would drift on long rows.
            sums = F.pad(keys.cumsum(1, dtype=torch.float64), (0, 0, 1, 0))
        n = math.ceil(1 / slope) if slope else n_keys
        first = max(n - 1, past)  # the first position with a query and n keys
        if first >= n_keys:
            ranges.append(0.0)
            continue
        queries = q[:, head, first - past :].float()
        near = (sums[:, first + 1 :] - sums[:, first + 1 - n : n_keys + 1 - n]).float() / n
        largest = abs(scale) * torch.linalg.vector_norm(queries, dim=2) * longest
        content = float((largest - scale * torch.linalg.vecdot(queries, near)).max())
        bias = slope * (n - 1) / 2 - math.log(n * -math.expm1(-slope)) if slope else 0.0
        rounding = 1e-3 + 1e-5 * float(largest.max())  # of norms and sums in float32
        ranges.append(content + bias + rounding)
    return torch.tensor(ranges, dtype=torch.float64, device=q.device)


def horizon(q, k, v, slopes, *, scale, documents=None, windows=None, dropout=0.0) -> Tensor:
    """Attention that leaves out what lies beyond each head's horizon.

    Arguments as for `mptbook.model.reference.Backend`. The range of the scores is measured on
    the queries and keys given, so the result is that of the other forms to the rounding of the
    dtype, whatever they are: see `horizons` for the proof, `tolerance` for the error. Below
    `HORIZON_TOKENS` queries measuring costs more than it saves, and nothing is left out. On a
    GPU the windows are handed to `flash` or `flex`; measuring makes the program wait for it.
    """
    check(q, k, v, slopes, documents, windows)
    if dropout:
        raise ValueError(f"attn_pdrop is {dropout}, and horizon cannot drop weights; use sdpa")
    n_keys = k.shape[2]
    if q.shape[2] >= HORIZON_TOKENS:
        reach = horizons(slopes, measured_ranges(q, k, slopes, scale), tolerance(q.dtype))
        if documents is None:  # a wide window costs more, in blocks, than all keys in one call
            reach = torch.where(reach > WIDE * n_keys, n_keys, reach)
        windows = reach if windows is None else torch.minimum(windows, reach)
    elif windows is None:
        windows = torch.full_like(slopes, n_keys, dtype=torch.int64)
    how = {"scale": scale, "documents": documents, "windows": windows.clamp(max=n_keys)}
    if q.device.type == "cpu":
        return windowed(q, k, v, slopes, **how)
    return backend("flash" if choose(q, k) == "flash" else "flex")(q, k, v, slopes, **how)


# Measured on CPUs.
HORIZON_TOKENS = 2048
WIDE = 0.6  # of all keys


def static_ranges(attention: Attention, norm: Norm) -> Tensor:
    """(H,) float64: the range of each head for any text, twice `static_bounds`, in nats."""
    return 2 * static_bounds(attention, norm)


@torch.no_grad()
def static_bounds(attention: Attention, norm: Norm) -> Tensor:
    """A bound on the scores of each head for any text, from the weights alone.

    A normed vector of D numbers is at most sqrt(D) long before its gain. So where queries and
    keys are normed (``qk_ln``), their lengths are bounded by the gains. Where they are not, the
    norm before the layer bounds them: with its gain in the weights W of queries and keys,
    |q . k| <= D * |W_q^T W_k|, a spectral norm. Where they are clipped to c (``clip_qkv``), a
    product of K numbers is at most K * c ** 2 besides, and the smaller bound counts.

    What bfloat16 may round up on the way from the norm to the product is added.

    Args:
        attention: the layer; its weights may be of any dtype.
        norm: the norm whose output it reads.

    Returns:
        (H,) float64, in nats.
    """
    heads, kv_heads, width = attention.n_heads, attention.kv_heads, attention.width
    if attention.q_ln is not None:
        q, k = normed_lengths(attention.q_ln, heads), normed_lengths(attention.k_ln, kv_heads)
        bound = q * k.repeat_interleave(heads // kv_heads)
    else:
        bound = projected_bounds(attention, norm)
        if attention.clip is not None:
            bound = bound.clamp(max=width * attention.clip**2)
    rounding = (1 + torch.finfo(torch.bfloat16).eps) ** 4  # of norm, gain and both factors
    return abs(attention.scale) * rounding * bound


def normed_lengths(norm: Norm, heads: int) -> Tensor:
    """(heads,) float64: the largest length that a head's part of a norm's output can have."""
    gain = norm.weight.double().abs().unflatten(0, (heads, -1)).amax(1)
    lengths = gain * norm.weight.numel() ** 0.5
    if norm.bias is not None:
        lengths += norm.bias.double().unflatten(0, (heads, -1)).norm(dim=1)
    return lengths


def projected_bounds(attention: Attention, norm: Norm) -> Tensor:
    """(H,) float64: the largest product of a query and a key projected from normed vectors."""
    layer, d_model = attention.Wqkv, norm.weight.numel()
    weight = (layer.weight.double() * norm.weight.double()).split(attention.splits)
    counts = attention.n_heads, attention.kv_heads
    copies = attention.n_heads // attention.kv_heads
    q, k = (w.unflatten(0, (n, -1)) for w, n in zip(weight, counts, strict=False))
    k = k.repeat_interleave(copies, dim=0)  # both (H, K, D)
    if layer.bias is None and norm.bias is None:
        # |q^T k|, of D x D numbers, squared is the largest eigenvalue of this K x K product.
        square = (q @ q.mT) @ (k @ k.mT)
        return torch.linalg.eigvals(square).abs().amax(1).sqrt() * d_model
    shift = layer.weight.new_zeros(layer.out_features).double()
    if norm.bias is not None:
        shift += layer.weight.double() @ norm.bias.double()
    if layer.bias is not None:
        shift += layer.bias.double()
    shifts = shift.split(attention.splits)
    shift_q, shift_k = (b.unflatten(0, (n, -1)) for b, n in zip(shifts, counts, strict=False))
    lengths_q = torch.linalg.matrix_norm(q, 2) * d_model**0.5 + shift_q.norm(dim=1)
    shift_k = shift_k.repeat_interleave(copies, dim=0)
    return lengths_q * (torch.linalg.matrix_norm(k, 2) * d_model**0.5 + shift_k.norm(dim=1))
