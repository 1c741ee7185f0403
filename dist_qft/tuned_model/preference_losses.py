"""Losses on log-probability ratios of answers, under the names of TRL's trainers. Nothing here knows a model."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Ratios(NamedTuple):
    """log p(answer) of the tuned model minus that of the reference, (pairs,), and the answers' lengths in tokens."""

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor

    @property
    def margin(self) -> Tensor:
        return self.chosen - self.rejected

    @property
    def margin_per_token(self) -> Tensor:
        """The margin of means over tokens."""
        return self.chosen / self.chosen_length.clamp(min=1) - self.rejected / self.rejected_length.clamp(min=1)


def pair_losses(kind: str, ratios: Ratios, beta: float, smoothing: float) -> Tensor:
    """The loss of each pair, (pairs,).

    Sources: sigmoid arXiv 2305.18290, hinge 2305.10425, ipo 2310.12036, exo_pair 2402.00856, nca_pair 2402.05369,
    robust 2403.00409, bco_pair 2404.04656, sppo_hard 2405.00675, apo_zero and apo_down 2408.06266, sigmoid_norm
    2411.15124.
    """
    margin = beta * ratios.margin
    chosen, rejected = beta * ratios.chosen, beta * ratios.rejected
    match kind:
        case "sigmoid":
            return -F.logsigmoid(margin)
        case "sigmoid_norm":
            return -F.logsigmoid(beta * ratios.margin_per_token)
        case "hinge":
            return torch.relu(1 - margin)
        case "ipo":
            return (ratios.margin_per_token - 1 / (2 * beta)) ** 2
        case "robust":
            kept, flipped = F.logsigmoid(margin), F.logsigmoid(-margin)
            return (smoothing * flipped - (1 - smoothing) * kept) / (1 - 2 * smoothing)
        case "exo_pair":
            share = torch.tensor(smoothing, dtype=margin.dtype, device=margin.device)
            first = torch.sigmoid(margin) * (F.logsigmoid(margin) - torch.log1p(-share))
            return first + torch.sigmoid(-margin) * (F.logsigmoid(-margin) - torch.log(share))
        case "nca_pair":
            return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))
        case "bco_pair":
            return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)
        case "sppo_hard":
            return (ratios.chosen - 0.5 / beta) ** 2 + (ratios.rejected + 0.5 / beta) ** 2
        case "apo_zero":
            return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)
        case "apo_down":
            return torch.sigmoid(chosen) + 1 - torch.sigmoid(margin)
    raise ValueError(f"unknown loss {kind!r}")


def kto_losses(kind: str, ratios: Tensor, wanted: Tensor, kl: Tensor, beta: float) -> Tensor:
    """The loss of each rated answer, (answers,), from its ratio, its verdict (bool), and the KL (scalar).

    Sources: kto arXiv 2402.01306, equation 7; apo_zero_unpaired 2408.06266, equation 7.
    """
    if kind == "apo_zero_unpaired":
        return torch.where(wanted, 1 - torch.sigmoid(beta * ratios), torch.sigmoid(beta * ratios))
    gain = beta * (ratios - kl)
    return 1 - torch.sigmoid(torch.where(wanted, gain, -gain))


def odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """log of odds(chosen) / odds(rejected), odds(p) = p / (1 - p), from mean log-probabilities (pairs,).

    Of an answer whose probability rounds to 1 the odds are those of the next smaller number, without a gradient: its
    softmax has none either.
    """
    largest = -torch.finfo(chosen.dtype).eps
    chosen, rejected = chosen.clamp(max=largest), rejected.clamp(max=largest)
    return (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0, by whichever form keeps its digits (Maechler, 2012)."""
    near = x > -0.6931471805599453
    # Of two branches both get a gradient: each sees only values that it can take.
    below = torch.where(near, torch.full_like(x, -1.0), x)
    above = torch.where(near, x, torch.full_like(x, -0.1))
    return torch.where(near, torch.log(-torch.expm1(above)), torch.log1p(-torch.exp(below)))
