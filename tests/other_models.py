"""Models of other libraries, trained with torch.nn's GRU, LSTM or RNN and with ours in their place.

    pip install sb3-contrib gluonts lightning neuralforecast pytorch-forecasting skorch
    python tests/other_models.py

This script is not part of the suite. Each model is trained from one seed in three processes: with torch.nn's layer,
with ours, and with torch.nn's after one rounding of its initial weights. The parameters after training are compared.
Ours may differ from torch.nn's by at most ten times the change that the rounding makes. A library that is not installed
is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import masked_rnn

KINDS = ("GRU", "LSTM", "RNN")
ALLOWED = 10
"""The allowed difference, in multiples of the change that a rounding makes."""


def put_in_place(layers: str) -> None:
    """Replaces torch.nn's classes before a library is imported."""
    for kind in KINDS:
        base: Any = getattr(nn, kind)
        if layers == "ours":
            base = getattr(masked_rnn, f"Masked{kind}")

        class Layer(base):  # type: ignore[misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs, **({"flatten_hidden": False} if layers == "ours" else {}))
                if layers == "rounded":
                    with torch.no_grad():
                        for weight in self.parameters():
                            weight.mul_(1 + torch.finfo(weight.dtype).eps)

        Layer.__name__ = Layer.__qualname__ = kind
        setattr(nn, kind, Layer)


def waves(series: int, steps: int) -> np.ndarray:
    t, k = np.arange(steps), np.arange(series)[:, None]
    noise = np.random.default_rng(0).normal(0, 0.1, (series, steps))
    return (np.sin(t / (2 + k)) + noise + 2).astype(np.float32)


def sb3_contrib() -> nn.Module:
    """Trains a recurrent policy (LSTM) by PPO."""
    from sb3_contrib import RecurrentPPO

    model = RecurrentPPO("MlpLstmPolicy", "CartPole-v1", n_steps=64, batch_size=64, n_epochs=4, seed=0, device="cpu")
    return model.learn(256).policy


def gluonts() -> nn.Module:
    """Trains DeepAR (LSTM)."""
    from gluonts.dataset.common import ListDataset
    from gluonts.torch import DeepAREstimator
    from lightning.pytorch import seed_everything

    seed_everything(0)
    data = ListDataset([{"start": "2020-01-01", "target": wave} for wave in waves(8, 60)], freq="D")
    sizes = {"prediction_length": 5, "hidden_size": 16, "dropout_rate": 0.0, "num_batches_per_epoch": 10}
    trainer = {"max_epochs": 2, "accelerator": "cpu", "logger": False}
    estimator = DeepAREstimator(freq="D", **sizes, trainer_kwargs=trainer)
    return estimator.train_model(data).trained_net


def neuralforecast() -> nn.Module:
    """Trains its model GRU."""
    import pandas as pd
    from neuralforecast import NeuralForecast
    from neuralforecast.models import GRU

    days = pd.date_range("2020-01-01", periods=60)
    rows = [pd.DataFrame({"unique_id": k, "ds": days, "y": wave}) for k, wave in enumerate(waves(8, 60))]
    trainer = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    model = GRU(h=5, input_size=20, encoder_hidden_size=16, decoder_hidden_size=16, max_steps=20, **trainer)
    forecast = NeuralForecast([model], freq="D")
    forecast.fit(pd.concat(rows))
    return forecast.models[0]


def pytorch_forecasting() -> nn.Module:
    """Trains its RecurrentNetwork (GRU) over series of different length."""
    import lightning
    import pandas as pd
    from pytorch_forecasting import RecurrentNetwork, TimeSeriesDataSet

    lightning.seed_everything(0)
    rows = [pd.DataFrame({"k": str(k), "t": range(60), "y": wave}) for k, wave in enumerate(waves(8, 60))]
    data = TimeSeriesDataSet(
        pd.concat(rows, ignore_index=True),
        time_idx="t",
        target="y",
        group_ids=["k"],
        min_encoder_length=5,
        max_encoder_length=20,
        max_prediction_length=5,
        randomize_length=True,
        time_varying_unknown_reals=["y"],
    )
    model = RecurrentNetwork.from_dataset(data, cell_type="GRU", hidden_size=16, rnn_layers=2, dropout=0.0)
    trainer = lightning.Trainer(max_steps=20, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(model, data.to_dataloader(batch_size=16, num_workers=0))
    return model


def skorch() -> nn.Module:
    """Trains a classifier of last states (RNN)."""
    from skorch import NeuralNetClassifier

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.RNN(1, 16, batch_first=True), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[1][-1]).softmax(-1)

    torch.manual_seed(0)
    x = waves(64, 20)[..., None]
    net = NeuralNetClassifier(Classifier, max_epochs=5, lr=0.1, train_split=None, verbose=0)
    net.fit(x, np.arange(64) % 2)
    return net.module_


MODELS: dict[str, Callable[[], nn.Module]] = {
    "sb3_contrib": sb3_contrib,
    "gluonts": gluonts,
    "neuralforecast": neuralforecast,
    "pytorch_forecasting": pytorch_forecasting,
    "skorch": skorch,
}


def train(library: str, layers: str, path: Path) -> None:
    """Trains in a process of its own, and writes the parameters after training."""
    put_in_place(layers)
    torch.set_num_threads(1)
    model = MODELS[library]()
    recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    assert recurrent, "the model has no recurrent layer"
    masked = (masked_rnn.MaskedGRU, masked_rnn.MaskedLSTM, masked_rnn.MaskedRNN)
    assert all(isinstance(module, masked) == (layers == "ours") for module in recurrent)
    torch.save(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train models of other libraries with ours in place of torch.nn's.")
    parser.add_argument("libraries", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        train(arguments.libraries[0], arguments.child[0], Path(arguments.child[1]))
        return

    failed = False
    print("largest change of a parameter, relative to the largest parameter: by our layer, and by a rounding")
    for library in arguments.libraries:
        if importlib.util.find_spec(library) is None:
            print(f"{library}: left out, not installed")
            continue
        found: dict[str, Tensor] = {}
        with tempfile.TemporaryDirectory() as folder:
            for layers in ("torch", "ours", "rounded"):
                path = Path(folder) / layers
                command = [sys.executable, str(Path(__file__).resolve()), library, "--child", layers, str(path)]
                child = subprocess.run(command, cwd=folder, capture_output=True, text=True)
                if child.returncode:
                    sys.exit(f"{library} with {layers}:\n{child.stdout}\n{child.stderr}")
                found[layers] = torch.load(path)
        ours, rounded = (
            ((found[layers] - found["torch"]).abs().max() / found["torch"].abs().max()).item()
            for layers in ("ours", "rounded")
        )
        agrees = ours <= ALLOWED * rounded
        failed |= not agrees
        print(f"{library}: {ours:.1e}, {rounded:.1e}{'' if agrees else ': TOO MUCH'}", flush=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
