"""Trains a recurrent policy in a maze. It has to remember the first step, and its state starts anew in each episode.

The maze is a T. At the first step of an episode a light is on or off. A corridor of 4 to 12 steps follows, in which
nothing is seen. At the junction the policy turns left or right: right is correct if the light was on. Half of the
episodes are cut off before the junction, as by a time limit, and the policy does not see that the next one begins. So a
light that was on may belong to the last episode, and only `resets` say whether it does.

The policy is a MaskedGRU and a linear layer, trained by REINFORCE. It acts in 64 mazes, step by step, and passes the
state from step to step. To learn, one call runs a whole rollout, with `resets` where an episode starts: about nine
episodes in each row. The example checks that acting and learning give the same log-probabilities.

With the same seeds, it trains two other policies: the same one without resets, whose state runs on from one episode
into the next, and one without memory, whose state is reset before each step.

    python -m pip install -e ".[examples]"
    python examples/recurrent_policy.py

This prints how often each policy turns correctly at the end of training, for five seeds, and draws
examples/output/recurrent_policy.png, or the file given by `--out`. `--short` is a quick trial of a few updates.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributions import Categorical

from masked_rnn import MaskedGRU

PLOT = Path(__file__).parent / "output" / "recurrent_policy.png"
COLOURS = {"with resets": "#2e7fc2", "without resets": "#c0392b", "without memory": "#7a9a3a"}
GREY = "#7a7a7a"
MAZES, STEPS, HIDDEN = 64, 64, 32
LAST = 20
"""Correct turns are counted over so many updates at the end of training."""


class Policy(nn.Module):
    """Observations (N, T, 2), state (N, H), where episodes start (N, T) -> action logits (N, T, 2), last state."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant
        self.gru = MaskedGRU(2, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, 2)

    def forward(self, obs: Tensor, state: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        resets = {"with resets": starts, "without resets": None, "without memory": torch.ones_like(starts)}
        output, state = self.gru(obs, state, resets=resets[self.variant])
        return self.head(output), state


class Mazes:
    """Many mazes at once. When an episode ends, the next one begins in the same maze."""

    def __init__(self) -> None:
        self.t = torch.zeros(MAZES, dtype=torch.long)
        self.light, self.junction, self.end = self.draw()

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Draws whether the light is on, the junction's step and the last step. Half of the episodes are cut off."""
        junction = torch.randint(5, 14, (MAZES,))
        cut_at = (torch.rand(MAZES) * junction).long()
        return torch.rand(MAZES) < 0.5, junction, torch.where(torch.rand(MAZES) < 0.5, cut_at, junction)

    def observe(self) -> tuple[Tensor, Tensor]:
        """Returns the observations (N, 2), which are light and junction, and where an episode starts (N,)."""
        starts = self.t == 0
        return torch.stack([self.light & starts, self.t == self.junction], 1).float(), starts

    def step(self, actions: Tensor) -> Tensor:
        """Runs a step. Returns the rewards (N,): 1 for a correct turn, -1 for a wrong one, 0 away from the junction."""
        correct = actions.bool() == self.light
        rewards = torch.where(self.t == self.junction, 2.0 * correct - 1, 0.0)
        ended = self.t == self.end
        self.t = torch.where(ended, 0, self.t + 1)
        new = self.draw()
        self.light, self.junction, self.end = (
            torch.where(ended, a, b) for a, b in zip(new, (self.light, self.junction, self.end), strict=True)
        )
        return rewards


def train(variant: str, seed: int, updates: int) -> Tensor:
    """Trains a policy. Returns the share of correct turns in each update's rollout, (updates,)."""
    torch.manual_seed(seed)  # the same initial weights for all variants
    policy, mazes = Policy(variant), Mazes()
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    state, shares = torch.zeros(MAZES, HIDDEN), []
    for _ in range(updates):
        first, rows = state, []
        with torch.no_grad():
            for _ in range(STEPS):
                obs, starts = mazes.observe()
                logits, state = policy(obs[:, None], state, starts[:, None])
                choice = Categorical(logits=logits[:, 0])
                actions = choice.sample()
                rows.append((obs, starts, actions, choice.log_prob(actions), mazes.step(actions)))
        obs, starts, actions, acted, rewards = (torch.stack(column, 1) for column in zip(*rows, strict=True))

        logits, _ = policy(obs, first, starts)  # the whole rollout in one call
        choice = Categorical(logits=logits)
        log_probs, turned = choice.log_prob(actions), rewards != 0
        torch.testing.assert_close(log_probs, acted, atol=1e-4, rtol=1e-4)
        loss = -(rewards * log_probs + 0.01 * choice.entropy())[turned].mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        shares.append((rewards[turned] > 0).float().mean())
    return torch.stack(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a recurrent policy with resets, without, and without memory.")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="20 updates of one seed, and nothing demanded")
    parser.add_argument("--out", type=Path, default=PLOT, help="where the plot goes")
    args = parser.parse_args()
    seeds, updates = (1, 20) if args.short else (args.seeds, args.updates)

    torch.set_num_threads(1)  # the matrices are too small for a second thread to help
    table = Table("policy", *(f"seed {seed}" for seed in range(seeds)), "processor time, s", title="Correct turns, %")
    shares: dict[str, Tensor] = {}
    for variant in COLOURS:
        began = time.process_time()
        shares[variant] = torch.stack([train(variant, seed, updates) for seed in range(seeds)])
        ends = [f"{100 * share:.1f}" for share in final(shares[variant]).tolist()]
        table.add_row(variant, *ends, f"{time.process_time() - began:.0f}")
    Console(width=100).print(table)
    plot(shares, args.out)

    if not args.short:
        with_resets, without_resets, without_memory = map(final, shares.values())
        assert with_resets.min() > 0.99, "with resets, nearly every turn has to be correct"
        assert without_resets.max() < 0.95, "without resets, turns have to be wrong more often"
        assert (without_memory - 0.5).abs().max() < 0.05, "without memory, turns have to be guessed"


def final(shares: Tensor) -> Tensor:
    return shares[:, -LAST:].mean(1)


def plot(shares: dict[str, Tensor], out: Path) -> None:
    """Plots the mean over seeds, in a band from the worst seed to the best. Each point is a mean over ten updates."""
    mpl.rcParams.update({"text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "font.size": 11})
    mpl.rcParams.update({"xtick.color": GREY, "ytick.color": GREY, "svg.hashsalt": "masked_rnn"})
    mpl.rcParams["svg.fonttype"] = "none"  # text stays text, in the reader's fonts
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for (variant, of_seeds), style in zip(shares.items(), ("-", "--", ":"), strict=True):
        smooth = 100 * of_seeds.unfold(1, 10, 5).mean(2)
        steps = [(10 + 5 * k) * MAZES * STEPS / 1000 for k in range(smooth.size(1))]
        axes.fill_between(steps, smooth.amin(0), smooth.amax(0), color=COLOURS[variant], alpha=0.25, linewidth=0)
        axes.plot(steps, smooth.mean(0), style, color=COLOURS[variant])
        axes.text(steps[-1], smooth[:, -1].mean(), f" {variant}", color=COLOURS[variant], va="center")
    axes.set(xlabel="environment steps, thousands", ylabel="correct turns, %", ylim=(40, 102))
    axes.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    is_svg = out.suffix == ".svg"
    figure.savefig(out, dpi=150, transparent=is_svg, metadata={"Date": None} if is_svg else None)
    print(f"Plot: {out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out}")


if __name__ == "__main__":
    main()
