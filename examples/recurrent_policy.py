"""Balance a pole without seeing how fast it moves: a recurrent policy, whose state starts anew with each episode.

CartPole-v1 shows the cart's position and the pole's angle, and hides both velocities: the policy has to remember. It is
a MaskedGRU with two heads, trained by PPO. Sixteen environments run side by side, and their episodes end anywhere in a
rollout. While acting, the state is handed on step by step. In learning, the whole rollout goes through the layer in one
call, with `resets` where an episode starts. Each first pass of learning has to give the log-probabilities of acting.

Beside it, with the same seed and budget: the same policy without resets, whose state runs on from one episode into the
next, and one without memory, reset before each step. The last fails. The one without resets does about as well here:
CartPole forgives a state left over from the last episode. But its episodes are not independent: what it does in one
depends on the one before.

    python -m pip install -e ".[examples]"
    python examples/recurrent_policy.py

prints the mean return of each one's last 100 episodes and draws examples/output/recurrent_policy.png, or the file given
by `--out`. The policy with resets has to reach 400 of 500. `--short` is a quick trial of a few updates.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gymnasium
import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.distributions import Categorical

from masked_rnn import MaskedGRU

PLOT = Path(__file__).parent / "output" / "recurrent_policy.png"
VARIANTS = ("with resets", "without resets", "without memory")
REQUIRED_RETURN = 400
ENVIRONMENTS, STEPS, EPOCHS = 16, 128, 8
LEARNING_RATE, DISCOUNT, TRACE, CLIP = 3e-3, 0.99, 0.95, 0.2
SEEN = [0, 2]
"""Position and angle, of position, velocity, angle and angular velocity."""
SCALE = np.array([1.0, 10.0], dtype=np.float32)
Episodes = list[tuple[int, float]]
"""After how many environment steps each episode ended, and its return."""


class Policy(nn.Module):
    """Observations (N, T, 2), where episodes start (N, T) -> action logits (N, T, 2), values (N, T), last state."""

    def __init__(self, variant: str, hidden_size: int = 64) -> None:
        super().__init__()
        self.variant = variant
        self.gru = MaskedGRU(len(SEEN), hidden_size, batch_first=True)
        self.actor, self.critic = nn.Linear(hidden_size, 2), nn.Linear(hidden_size, 1)
        nn.init.orthogonal_(self.actor.weight, 0.01)

    def forward(self, obs: Tensor, state: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        resets = {"with resets": starts, "without resets": None, "without memory": torch.ones_like(starts)}
        output, state = self.gru(obs, state, resets=resets[self.variant])
        return self.actor(output), self.critic(output).squeeze(-1), state


class Rollout(NamedTuple):
    """T steps of N environments, each (N, T) but for obs (N, T, 2) and first_state (N, H)."""

    obs: Tensor
    first_state: Tensor
    starts: Tensor
    actions: Tensor
    log_probs: Tensor
    advantages: Tensor
    returns: Tensor


class Actor:
    """Acts in all environments, and keeps what goes on from one rollout to the next."""

    def __init__(self, policy: Policy, seed: int) -> None:
        self.policy = policy
        self.environments = [gymnasium.make("CartPole-v1") for _ in range(ENVIRONMENTS)]
        self.obs = np.stack([e.reset(seed=seed * 1000 + n)[0] for n, e in enumerate(self.environments)])
        self.starts = torch.ones(ENVIRONMENTS, dtype=torch.bool)
        self.state = torch.zeros(ENVIRONMENTS, policy.gru.hidden_size)
        self.total, self.running = 0, np.zeros(ENVIRONMENTS)
        self.episodes: Episodes = []

    @torch.no_grad()
    def rollout(self) -> Rollout:
        first_state = self.state
        columns: list[tuple[Tensor, ...]] = []
        for _ in range(STEPS):
            obs, starts = seen(self.obs), self.starts
            logits, values, self.state = self.policy(obs[:, None], self.state, starts[:, None])
            choice = Categorical(logits=logits[:, 0])
            actions = choice.sample()
            rewards = self.step(actions)
            columns.append((obs, starts, actions, choice.log_prob(actions), rewards, values[:, 0]))
        obs, starts, actions, log_probs, rewards, values = (torch.stack(c, 1) for c in zip(*columns, strict=True))
        after = self.value(self.obs, self.starts)
        advantages = advantages_of(rewards, torch.cat([values, after[:, None]], 1), starts, self.starts)
        return Rollout(obs, first_state, starts, actions, log_probs, advantages, advantages + values)

    def step(self, actions: Tensor) -> Tensor:
        """One step in each environment; where an episode ended, the next one begins. The rewards, (N,)."""
        last_obs, cut = np.empty_like(self.obs), np.zeros(ENVIRONMENTS, dtype=bool)
        self.starts = torch.zeros(ENVIRONMENTS, dtype=torch.bool)
        self.total += ENVIRONMENTS
        self.running += 1  # the reward of each step
        for n, (environment, action) in enumerate(zip(self.environments, actions.tolist(), strict=True)):
            self.obs[n], _, terminated, truncated, _ = environment.step(action)
            if terminated or truncated:
                last_obs[n], cut[n] = self.obs[n], not terminated
                self.obs[n], _ = environment.reset()
                self.starts[n] = True
                self.episodes.append((self.total, self.running[n]))
                self.running[n] = 0
        # Rewards so small that values are near 1. The time limit is no failure: what would have followed counts.
        rewards = torch.full((ENVIRONMENTS,), 1 - DISCOUNT)
        if cut.any():
            on = self.value(last_obs, torch.zeros_like(self.starts))
            rewards += DISCOUNT * torch.where(torch.from_numpy(cut), on, 0)
        return rewards

    def value(self, obs: np.ndarray, starts: Tensor) -> Tensor:
        return self.policy(seen(obs)[:, None], self.state, starts[:, None])[1][:, 0]


def seen(obs: np.ndarray) -> Tensor:
    return torch.from_numpy(obs[:, SEEN] * SCALE)


def advantages_of(rewards: Tensor, values: Tensor, starts: Tensor, next_starts: Tensor) -> Tensor:
    """Generalized advantage estimation: rewards and starts (N, T), values (N, T + 1)."""
    goes_on = ~torch.cat([starts[:, 1:], next_starts[:, None]], 1)
    errors = rewards + DISCOUNT * goes_on * values[:, 1:] - values[:, :-1]
    advantages, following = torch.empty_like(rewards), torch.zeros(len(rewards))
    for t in reversed(range(rewards.size(1))):
        following = errors[:, t] + DISCOUNT * TRACE * goes_on[:, t] * following
        advantages[:, t] = following
    return advantages


def train_updates(policy: Policy, actor: Actor, updates: int) -> Iterator[None]:
    """Yields after each update."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=LEARNING_RATE, eps=1e-5)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=updates)
    for _ in range(updates):
        r = actor.rollout()
        advantages = (r.advantages - r.advantages.mean()) / (r.advantages.std() + 1e-8)
        for epoch in range(EPOCHS):
            logits, values, _ = policy(r.obs, r.first_state, r.starts)
            choice = Categorical(logits=logits)
            log_probs = choice.log_prob(r.actions)
            if epoch == 0:
                torch.testing.assert_close(log_probs, r.log_probs, atol=1e-4, rtol=1e-4)
            ratio = (log_probs - r.log_probs).exp()
            gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()
            loss = 0.5 * (values - r.returns).square().mean() - gain - 0.01 * choice.entropy().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimizer.step()
        schedule.step()
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a recurrent policy with resets, without, and without memory.")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--short", action="store_true", help="4 updates, and no return demanded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=PLOT, help="where the plot goes")
    args = parser.parse_args()
    updates = 4 if args.short else args.updates

    # The matrices are so small that a second thread waits more than it works.
    torch.set_num_threads(1)
    episodes: dict[str, Episodes] = {}
    seconds: dict[str, float] = {}
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("return {task.fields[reached]:.0f}")) as progress:
        for variant in VARIANTS:
            task = progress.add_task(variant, total=updates, reached=0.0)
            torch.manual_seed(args.seed)  # the same initial weights for all
            policy = Policy(variant)
            actor = Actor(policy, args.seed)
            begin = time.perf_counter()
            for _ in train_updates(policy, actor, updates):
                progress.update(task, advance=1, reached=reached(actor.episodes))
            episodes[variant], seconds[variant] = actor.episodes, time.perf_counter() - begin

    report(episodes, seconds)
    plot(episodes, args.out)
    if not args.short:
        final = reached(episodes["with resets"])
        assert final >= REQUIRED_RETURN, f"return {final:.0f} with resets, expected at least {REQUIRED_RETURN}"


def reached(episodes: Episodes) -> float:
    """The mean return of the last 100 episodes."""
    return float(np.mean([value for _, value in episodes[-100:]])) if episodes else 0.0


def report(episodes: dict[str, Episodes], seconds: dict[str, float]) -> None:
    table = Table("policy", "mean return of the last 100 episodes", "seconds", title="CartPole-v1 without velocities")
    for variant, ended in episodes.items():
        table.add_row(variant, f"{reached(ended):.1f}", f"{seconds[variant]:.0f}")
    Console(width=100).print(table)


def plot(episodes: dict[str, Episodes], out: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for (variant, ended), style in zip(episodes.items(), ("-", "--", ":"), strict=True):
        steps = [after for after, _ in ended]
        axes.plot(steps, [reached(ended[: k + 1]) for k in range(len(ended))], style, label=variant)
    axes.set(xlabel="environment steps", ylabel="mean return of the last 100 episodes", ylim=(0, 510))
    axes.set_title("CartPole-v1 without velocities")
    axes.grid(alpha=0.3)
    axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    print(f"Plot: {out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out}")


if __name__ == "__main__":
    main()
