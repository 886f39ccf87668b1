"""Runs the code in README, pages and docstrings as it is shown there."""

from __future__ import annotations

import doctest
import importlib.util
import os
import pydoc
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from support.native_loops import SOURCES
from support.oracle import torch_before
from support.processes import run_code
from torch.nn.utils.rnn import pack_padded_sequence

import masked_rnn

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [  # those that compile or export are slow, and most recipes
    pytest.param(
        code,
        id=f"{page.stem}-{k}",
        marks=[pytest.mark.slow] * (page.stem == "capture" or (page.stem == "recipes" and k % 4 > 0)),
    )
    for page in PAGES
    for k, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]
NEEDS = {
    "keras": (("tensorflow", "tf_keras"), "'.[reference]'", "MASKED_RNN_REQUIRE_TENSORFLOW"),
    "tensorflow": (("tensorflow", "tf_keras"), "'.[reference]'", "MASKED_RNN_REQUIRE_TENSORFLOW"),
    "allennlp_light": (("allennlp_light",), "'.[migration]'", "MASKED_RNN_REQUIRE_MIGRATION"),
    "pytorch_forecasting": (("pytorch_forecasting",), "'.[migration]'", "MASKED_RNN_REQUIRE_MIGRATION"),
    "speechbrain": (("speechbrain",), "speechbrain", "MASKED_RNN_REQUIRE_SPEECHBRAIN"),
    "torchrl": (("torchrl",), "'.[recipes]'", "MASKED_RNN_REQUIRE_RECIPES"),
    "lightning": (("lightning",), "'.[recipes]'", "MASKED_RNN_REQUIRE_RECIPES"),
    "transformers": (("transformers", "accelerate"), "'.[recipes]'", "MASKED_RNN_REQUIRE_RECIPES"),
    "captum": (("captum",), "'.[recipes]'", "MASKED_RNN_REQUIRE_RECIPES"),
    "safetensors": (("safetensors",), "'.[recipes]'", "MASKED_RNN_REQUIRE_RECIPES"),
}
"""For each import in a block: the packages it needs, pip's argument for them, and the variable that makes a missing one
a failure."""


@pytest.mark.parametrize("code", BLOCKS)
def test_code_blocks_run(code: str, tmp_path: Path) -> None:
    if torch_before("2.13") and ("dynamo=True" in code or 'backend = "scan"' in code):
        pytest.skip("torch.onnx.export(dynamo=True) and loops in graphs need torch 2.13; docs/versions.md")
    if '"cuda"' in code and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    for name in set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)) & set(NEEDS):
        packages, installed_by, required = NEEDS[name]
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing and os.environ.get(required) != "1":
            pytest.skip(f"needs {' and '.join(missing)}: pip install {installed_by}")
    run_code(code, tmp_path)


LAYERS = [masked_rnn.MaskedGRU, masked_rnn.MaskedLSTM, masked_rnn.MaskedRNN]


@pytest.mark.parametrize("layer", LAYERS)
def test_docstring_examples_pass(layer: Any) -> None:
    runner = doctest.DocTestRunner()
    found = doctest.DocTestFinder().find(layer, layer.__name__, False, {"torch": torch, **vars(masked_rnn)})
    ours = [test for test in found if "._torch_layer" not in test.name and test.examples]
    for test in ours:
        runner.run(test)
    assert {test.name.partition(".")[2].partition("_")[0] for test in ours} >= {"", "from"}
    assert runner.tries > 3
    assert runner.failures == 0


@pytest.mark.parametrize("layer", LAYERS)
def test_forward_help_has_types_and_shapes(layer: Any) -> None:
    types = get_type_hints(layer.forward)
    assert list(types) == ["input", "hx", "lengths", "mask", "resets", "return"]
    assert Any not in types.values()
    shown = pydoc.render_doc(layer.forward, renderer=pydoc.plaintext)
    for name in types.keys() - {"return"}:
        assert re.search(rf"^ +{name}: .*?[(].*?T|^ +{name}: .*?[(]N|^ +{name}: .*mask", shown, re.MULTILINE), name
    assert "output: " in shown
    assert "(L·D, N, H)" in shown


def test_links_lead_to_files() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} points at {target}"


def test_tests_named_in_pages_exist() -> None:
    for page in PAGES:
        file = ""
        for named, test in re.findall(r"(?:(tests/[\w/]+\.py)|`)::(test_\w+)", page.read_text()):
            file = named or file
            assert f"def {test}(" in (ROOT / file).read_text(), f"{page.name} names {file}::{test}"


@pytest.mark.skipif(not SOURCES, reason="an installed wheel has no sources")
def test_files_named_in_pages_exist() -> None:
    """A page names a file or a folder by the end of its path, or by all of it."""
    folders = [ROOT / name for name in ("masked_rnn", "tests", "benchmarks", "examples", "docs")]
    there = [*ROOT.glob("*"), *(path for folder in folders for path in folder.rglob("*"))]
    paths = [f"/{path.relative_to(ROOT)}{'/' if path.is_dir() else ''}" for path in there]
    others = [ROOT / name for name in ("CONTRIBUTING.md", "benchmarks/README.md", "examples/README.md")]
    for page in [*PAGES, *others]:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for code in re.findall(r"`([^`]*)`", text):
            for name in re.findall(r"[\w/]+\.(?:py|h|cpp)\b|^[\w/]+/$", code):
                found = any(path.endswith(f"/{name}") for path in paths)
                assert found or name.startswith("aten/"), f"{page.name} names {name}"


@pytest.mark.skipif(not SOURCES, reason="an installed wheel has no sources")
def test_names_in_adding_a_cell_exist() -> None:
    files = [
        path
        for kind in ("py", "h")
        for folder in ("masked_rnn", "tests")
        for path in (ROOT / folder).rglob(f"*.{kind}")
    ]
    known = set(re.findall(r"\w+", "".join(path.read_text() for path in files)))
    for code in re.findall(r"`([^`]*)`", (ROOT / "docs" / "adding_a_cell.md").read_text()):
        if re.fullmatch(r"\w+([.:]+\w+)*", code) and not code.endswith((".py", ".h")):
            assert set(re.findall(r"\w+", code)) <= known, code


def test_anchors_lead_to_headings() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", page.read_text()):
            there = page.parent / target if target else page
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{page.name} points at {target}#{anchor}"


def test_faq_quotes_error_messages() -> None:
    faq, x = (ROOT / "docs" / "faq.md").read_text(), torch.zeros(2, 6, 1)
    for lengths in (torch.tensor([6, 0]), torch.tensor([2, 6]), torch.tensor([6, 2], device="meta")):
        with pytest.raises(RuntimeError) as error:
            pack_padded_sequence(x, lengths, batch_first=True)
        assert re.split("[.,]", str(error.value))[0] in faq
    with pytest.raises(ValueError, match="time steps") as ours:
        masked_rnn.MaskedGRU(1, 1, batch_first=True)(x, lengths=[6, 7])
    assert str(ours.value) in faq


def test_resets_are_called_starts() -> None:
    """An environment's `done` is True one step before the state has to start anew."""
    folders = ("masked_rnn", "docs", "examples", "benchmarks")
    written = [path for folder in folders for kind in ("py", "md") for path in (ROOT / folder).rglob(f"*.{kind}")]
    for path in [ROOT / "README.md", *written]:
        assert not re.search(r"resets=~?(dones?|terminated|truncated)\b(?!\.bool)", path.read_text()), path


def test_readme_is_short_and_its_head_covers_essentials() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 100
    head = "\n".join(lines[:40])
    for needed in ("```python", "padding.svg", "promised", "pip install -e . && python examples/", "Honest limits"):
        assert needed in head


def test_changelog_begins_with_current_version() -> None:
    """As a release with its date, or as the next one."""
    changes, version = (ROOT / "CHANGELOG.md").read_text(), re.escape(masked_rnn.__version__)
    newest = changes[changes.index("\n## ") :]
    assert re.match(rf"\n## (\[{version}\] - \d{{4}}-\d\d-\d\d|\[Unreleased\]\n\nThis will be {version}\.)\n", newest)
