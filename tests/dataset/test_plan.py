"""Pins: the ranking by hand; what is rendered in which round; best_fixed is the panel's best on the
last round's prompts; evolved workflows come from what scored well on the same concept; no held-out
workflow is in a train cell, and the train cells are as many as without; a plain plan has one round;
scores of cells that steer nothing change no plan."""

import dataclasses

import pytest

from flowloom.dataset.cells import Cell, Rendered, Template, render_seed
from flowloom.dataset.config import (
    BuildTripletsConfig,
    PanelConfig,
    PriorConfig,
    PromptsConfig,
)
from flowloom.dataset.plan import Plan
from flowloom.dataset.prompts import concept_of, draw_prompts, split_of
from flowloom.dataset.ranking import nearness, rank_by_concept
from flowloom.dataset.splits import is_held_out_workflow
from flowloom.dataset.workflows import draw_workflows, make_grammar
from flowloom.shapes.prompts import parse
from flowloom.workflow import Catalogue
from tests.dataset.small import FOUR_KINDS
from tests.render.tiny import CHECKPOINTS, flow, write_world

CONFIG = BuildTripletsConfig(
    prompts=PromptsConfig(kinds=FOUR_KINDS, num_train=40, num_calibration=8, num_test=8),
    panel=PanelConfig(
        settings=("4/2.0", "8/3.0"),
        lora_settings=(),
        num_prompts=(8, 12),
        num_kept=(2,),
        num_varied=1,
    ),
    random_cells=2,
    wild_cells=3,
    evolved_cells=(2, 1),
    evolved_seeds=(1, 3),
    num_parents=3,
)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    world = write_world(tmp_path_factory.mktemp("world"))
    catalogue = Catalogue.load(world / "catalogue.json.gz")
    specs = draw_prompts("train", 40, FOUR_KINDS, 0)
    flows = draw_workflows(make_grammar(catalogue, 64), PriorConfig(), 160, 0)
    flows = [Template.of(workflow.canonical(catalogue)) for workflow in flows]
    pairs = {spec.text: flows[4 * k : 4 * k + 4] for k, spec in enumerate(specs)}
    return Plan(CONFIG, catalogue, pairs)


def rendered(spec, workflow, *scores, origin="random"):
    workflow = workflow.canonical()
    cell = Cell(
        spec, workflow, workflow.template_fingerprint(), "train", origin, (0,) * len(scores)
    )
    return Rendered(cell, scores)


def test_ranking_by_hand():
    """One concept: a in one render, b in eight, both of one checkpoint, c of the other; c also in
    two renders of a concept that differs in two parts (nearness .09)."""
    spec, other = parse("a red circle"), parse("a blue square")
    a, b, c = flow(), flow(steps=5), flow(CHECKPOINTS[1])
    assert nearness(concept_of(spec), concept_of(other)) == pytest.approx(0.09)
    history = [rendered(spec, b, *[0.8] * 8), rendered(spec, c, 0.1), rendered(other, c, 1.0, 1.0)]
    # Everything: (6.4 + .1 + .18 + s_a) / 10.18. With s_a = 1: .754; files of a, b:
    # (7.4 + 4 * .754) / 13 = .801; a: (1 + 4 * .801) / 5 = .841;
    # b: (6.4 + 4 * .801) / 12 = .800; c: .55.
    ranked = rank_by_concept([rendered(spec, a, 1.0), *history])
    assert names(ranked[concept_of(spec)]) == names([a, b, c])
    assert set(ranked) == {concept_of(spec), concept_of(other)}
    # With s_a = .75: files .775, a: .770, b: .792.
    ranked = rank_by_concept([rendered(spec, a, 0.75), *history])
    assert names(ranked[concept_of(spec)]) == names([b, a, c])
    # Where only c was rendered it comes first.
    assert names(ranked[concept_of(other)])[0] == c.template_fingerprint()


def names(flows):
    """Fingerprints of workflows or templates."""
    return [f.fingerprint if isinstance(f, Template) else f.template_fingerprint() for f in flows]


def judge(cell):
    """Let checkpoint b be best on round shapes and a elsewhere."""
    loader = next(n for n in cell.workflow.nodes.values() if "ckpt_name" in n.inputs)
    is_round = concept_of(cell.spec)[1] == "round"
    good = loader.inputs["ckpt_name"] == CHECKPOINTS[1 if is_round else 0]
    return Rendered(cell, (0.9 if good else 0.1,) * len(cell.seeds))


def trained_on(cells, origin):
    return [cell for cell in cells if cell.origin == origin and cell.split == "train"]


def test_rounds(plan):
    assert plan.num_rounds == 3
    first = plan.cells(0, [])
    panel = [cell for cell in first if cell.origin == "panel"]
    drawn, wild = trained_on(first, "random"), trained_on(first, "wild")
    assert len(wild) == 3 * 40
    assert len(panel) == 4 * 8
    assert len(drawn) == sum(len(flows) for flows in plan.pairs.values()) > 60
    assert len({cell.seeds for cell in panel}) == 8  # common noise of a prompt
    assert len({cell.seeds for cell in drawn}) == len(drawn)

    history = [judge(cell) for cell in first]
    second = plan.cells(1, history)
    panel_prompts = {cell.spec.text for cell in second if cell.origin == "panel"}
    assert len(panel_prompts) == 12
    assert not panel_prompts & {cell.spec.text for cell in panel}
    evolved = trained_on(second, "evolved")
    assert len(evolved) == 2 * 40
    assert sum(judge(cell).scores[0] for cell in evolved) / len(evolved) > 0.7

    history += [judge(cell) for cell in second]
    third = plan.cells(2, history)
    last = trained_on(third, "evolved")
    assert len(last) == 40
    assert all(len(cell.seeds) == len(set(cell.seeds)) == 3 for cell in last)
    seen = {r.cell.fingerprint for r in history}
    assert all(cell.fingerprint in seen for cell in last)  # the last round edits nothing
    calibration = [c for c in (*first, *second, *third) if c.split == "calibration"]
    assert len(calibration) == 8 * 4
    assert {split_of(cell.spec) for cell in calibration} == {"calibration"}
    assert all(len(cell.seeds) == 4 for cell in calibration)
    assert {cell.origin for cell in calibration} == {"random", "evolved"}
    assert plan.cells(2, history) == third

    # What the scores of the others are changes nothing.
    assert {r.cell.split for r in history if not r.cell.steers} >= {"calibration"}
    blind = [r if r.cell.steers else Rendered(r.cell, ()) for r in history]
    assert plan.cells(2, blind) == third


def test_held_out_workflows_are_rendered_and_not_trained_on(plan):
    history, cells = [], []
    for number in range(plan.num_rounds):
        cells += plan.cells(number, history)
        history = [judge(cell) for cell in cells]
    held_out = {c.fingerprint for c in cells if c.split == "held_out_workflow"}
    train = {c.fingerprint for c in cells if c.split == "train"}
    assert all(map(is_held_out_workflow, held_out))
    assert not any(map(is_held_out_workflow, train))
    assert len(held_out) > 3
    prompts = {spec.text for spec in plan.train}
    assert {c.spec.text for c in cells if c.split == "held_out_workflow"} <= prompts
    others = [c for c in cells if c.split == "held_out_workflow" and c.origin != "panel"]
    assert {len(cell.seeds) for cell in others} == {CONFIG.held_out_seeds}
    renders = [(c.spec.text, c.fingerprint, seed) for c in cells for seed in c.seeds]
    assert len(set(renders)) == len(renders)


def test_a_plain_plan_has_one_round_and_evolves_nothing(plan):
    config = dataclasses.replace(CONFIG, mode="plain", random_seeds=2, calibration_cells=3)
    plain = Plan(config, plan.catalogue, {**plan.pairs})
    assert plain.num_rounds == 1
    cells = plain.cells(0, [])
    assert {cell.origin for cell in cells} == {"panel", "random", "wild"}
    assert {len(cell.seeds) for cell in trained_on(cells, "random")} == {2}
    calibration = [cell for cell in cells if cell.split == "calibration"]
    assert len(calibration) == 8 * 3
    _, rows = plain.best_fixed([judge(cell) for cell in cells])
    assert {row["num_renders"] for row in rows} == {8}


def test_a_persons_prompts_are_taken_and_must_be_of_the_shapes_language(plan, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(spec.text for spec in plan.train[:30]))
    lists = PromptsConfig(num_train=30, prompts_file=str(path))
    config = dataclasses.replace(CONFIG, prompts=lists)
    pairs = {spec.text: plan.pairs[spec.text] for spec in plan.train[:30]}
    mine = Plan(config, plan.catalogue, pairs)
    assert [spec.text for spec in mine.train] == [spec.text for spec in plan.train[:30]]
    path.write_text("\n".join(spec.text for spec in plan.train[:5]))
    five = {spec.text: plan.pairs[spec.text] for spec in plan.train[:5]}
    with pytest.raises(ValueError, match="got a sum of 20, expected at most 5, the train prompts"):
        Plan(config, plan.catalogue, five)
    path.write_text("a cat on a mat")
    with pytest.raises(ValueError, match=r"mine.txt:1: got a prompt outside the shapes language"):
        Plan(config, plan.catalogue, {})


def test_pairs_of_other_prompts_are_refused(plan):
    pairs = dict(list(plan.pairs.items())[1:])
    with pytest.raises(
        ValueError, match="prompts: got pairs of 39 prompts that are not the 40 tra"
    ):
        Plan(CONFIG, plan.catalogue, pairs)


def test_best_fixed_is_the_best_of_the_last_rounds_prompts(plan):
    early, late = plan.train[0], plan.train[8]
    a, b = flow(), flow(CHECKPOINTS[1])
    history = [
        rendered(early, a, 1.0, origin="panel"),
        rendered(early, b, 0.0, origin="panel"),
        rendered(late, a, 0.4, origin="panel"),
        rendered(late, b, 0.5, origin="panel"),
        rendered(late, flow(steps=2), 1.0, origin="random"),
    ]
    best, rows = plan.best_fixed(history)
    assert best.template_fingerprint() == b.template_fingerprint()
    assert [row["mean"] for row in rows] == [0.5, 0.4]


def test_seeds_differ_by_everything():
    seeds = {
        render_seed(seed, prompt, name, k)
        for seed in (0, 1)
        for prompt in ("a", "b")
        for name in ("panel", "x")
        for k in (0, 1)
    }
    assert len(seeds) == 16
    assert max(seeds) < 2**48


def test_configuration_errors_name_the_field():
    with pytest.raises(
        ValueError, match=r"panel.num_prompts: got 204, expected a sum of at most 40"
    ):
        BuildTripletsConfig(prompts=PromptsConfig(kinds=FOUR_KINDS, num_train=40))
    with pytest.raises(ValueError, match="num_kept: got"):
        dataclasses.replace(PanelConfig(), num_kept=(1,))
