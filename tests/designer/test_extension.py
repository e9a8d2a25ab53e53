"""Facts: training goes on from a start: with no step the weights are the start's, and a new file's
rows the mean of its kin's; tuning is carried over as a difference, so nothing changes where the
reference did not, and what the reference learnt is there where nothing was tuned; GRPO begins at
its start; a designer folder holds its catalogue."""

import dataclasses
import shutil

import pytest
import torch

from flowloom.designer.config import GRPOConfig, SFTConfig
from flowloom.designer.design import Designer
from flowloom.designer.extension import carry_adapter, file_heirs, load_extended, read_vocabulary
from flowloom.designer.loading import load_pair
from flowloom.designer.policy import Policy
from flowloom.designer.sft import train_sft
from flowloom.render.model_records import save_catalogue
from flowloom.runs import Run, write_json
from flowloom.workflow import Catalogue
from tests.designer.tiny import TINY

SFT = SFTConfig(policy=TINY, prior_steps=2, best_steps=1, batch_size=8, num_samples=4)


@pytest.fixture
def old(policy, grammar, catalogue, tmp_path):
    """Folders of a designer and its adapter."""
    folders = tmp_path / "designer", tmp_path / "adapter"
    policy.save(folders[0])
    write_json(folders[0] / "vocabulary.json", grammar.vocabulary.to_json())
    save_catalogue(folders[0] / "catalogue.json.gz", catalogue)
    for k, weight in enumerate(policy.tuned_parameters().values()):
        weight.data += 0.01 * (k + 1)
    policy.save_adapter(folders[1], folders[0])
    return folders


@pytest.fixture
def richer(catalogue, tmp_path):
    """A catalogue folder with one more checkpoint."""
    first = catalogue.files_in("checkpoints")[0]
    new = dataclasses.replace(first, name="shapes-new.safetensors", sha256="f" * 64)
    folder = tmp_path / "richer"
    folder.mkdir()
    save_catalogue(folder / "catalogue.json.gz", catalogue.with_files([new]))
    return folder


def _train(folder, config, **inputs):
    run = Run("train_sft", folder)
    run.begin()
    train_sft(config, run, **inputs)
    return run.out


def test_sft_goes_on_from_its_start(old, richer, inputs, tmp_path):
    data = {"catalogue": richer, "pairs": inputs["pairs"], "triplets": inputs["triplets"]}
    still = dataclasses.replace(SFT, prior_steps=0, best_steps=1, lr=1e-12)
    out = _train(tmp_path / "still", still, start=old[0], **data)
    catalogue = Catalogue.load(out / "catalogue.json.gz")
    assert catalogue.hash == Catalogue.load(richer / "catalogue.json.gz").hash
    begun, vocabulary = load_extended(old[0], catalogue)
    assert vocabulary.hash == read_vocabulary(out).hash
    for name, weight in Policy.load(out).state_dict().items():
        assert torch.allclose(weight, begun.state_dict()[name], atol=1e-8), name
    (new,) = file_heirs(read_vocabulary(old[0]), vocabulary)
    assert vocabulary.tokens[new].value == "shapes-new.safetensors"

    moved = _train(tmp_path / "moved", SFT, start=old[0], **data)
    head = Policy.load(moved).head.weight
    assert not torch.allclose(head, begun.head.weight, atol=1e-4)
    (designs,) = Designer.load(moved).design(
        ["a circle"], policy="sft", n=2, require=["ckpt_name=shapes-new.safetensors"]
    )
    assert designs


def test_tuning_is_carried_as_a_difference(old, tmp_path):
    designer_dir, adapter_dir = old
    tuned, reference = load_pair(designer_dir, adapter_dir)
    # Where the reference stays, so does the tuned policy.
    carry_adapter(designer_dir, adapter_dir, designer_dir, tmp_path / "same")
    same, _ = load_pair(designer_dir, tmp_path / "same")
    for name, weight in same.state_dict().items():
        assert torch.allclose(weight, tuned.state_dict()[name], atol=1e-6), name

    new_dir = tmp_path / "new"
    shutil.copytree(designer_dir, new_dir)
    new = Policy.load(designer_dir)
    for weight in new.tuned_parameters().values():
        weight.data *= 1.5
    new.save(new_dir)
    carry_adapter(designer_dir, adapter_dir, new_dir, tmp_path / "carried")
    carried, _ = load_pair(new_dir, tmp_path / "carried")
    for name, weight in carried.tuned_parameters().items():
        expected = 1.5 * reference.state_dict()[name] + (
            tuned.state_dict()[name] - reference.state_dict()[name]
        )
        assert torch.allclose(weight, expected, atol=1e-5), name
    with pytest.raises(ValueError, match="expected one of"):
        load_pair(designer_dir, tmp_path / "carried")


def test_grpo_begins_at_its_start(old, richer, inputs, tmp_path, monkeypatch):
    from flowloom.designer import grpo

    begun = []

    def watch(policy, *arguments):
        begun.append({name: w.detach().clone() for name, w in policy.tuned_parameters().items()})
        raise StopIteration

    monkeypatch.setattr(grpo, "_roll_out", watch)
    monkeypatch.setattr(grpo.Ensemble, "load", lambda folder: None)
    monkeypatch.setattr(grpo, "Watch", lambda *arguments: None)
    config = GRPOConfig(num_steps=1, prompts_per_step=2, designs_per_prompt=2, num_minibatches=1)
    for start in (None, old[1]):
        run = Run("train_grpo", tmp_path / f"grpo-{start is None}")
        run.begin()
        with pytest.raises(StopIteration):
            grpo.train_grpo(
                config, run, catalogue=inputs["catalogue"], triplets=inputs["triplets"],
                designer=old[0], reward=tmp_path, start=start,
            )  # fmt: skip
    tuned, reference = load_pair(*old)
    for found, wanted in zip(begun, (reference, tuned), strict=True):
        for name, weight in found.items():
            assert torch.equal(weight, wanted.tuned_parameters()[name])
