"""Facts pinned: words that decide the model come first; what a workflow does, in words."""

from flowloom.evaluation.choices import choices
from flowloom.evaluation.describe import describe
from tests.render.tiny import CHECKPOINTS, flow


def test_words_that_decide_the_model_come_first():
    # Circles get model b, everything else model a; colours are independent of the choice.
    prompts, workflows = [], []
    for number in range(80):
        shape = ("circle", "star")[number % 2]
        color = ("red", "blue")[number // 2 % 2]
        prompts.append(f"a {color} {shape}")
        workflows.append(flow(CHECKPOINTS[1] if shape == "circle" else CHECKPOINTS[0]))
    table = choices(prompts, workflows)
    assert sorted(table["models"]) == sorted(CHECKPOINTS)
    overall, *rows = table["rows"]
    assert overall == {"word": "all", "n": 80, "shares": [0.5, 0.5]}
    assert {row["word"] for row in rows[:2]} == {"circle", "star"}
    at = table["models"].index(CHECKPOINTS[1])
    by_word = {row["word"]: row for row in rows}
    assert by_word["circle"]["shares"][at] == 1.0
    assert by_word["star"]["shares"][at] == 0.0
    # Colours have nothing to do with the choice, and "a" is in every prompt.
    assert set(by_word) == {"circle", "star"}


def test_rare_words_and_rare_models_are_left_out():
    prompts = ["a star"] * 99 + ["a lonely circle"]
    workflows = [flow(CHECKPOINTS[0])] * 99 + [flow(CHECKPOINTS[1])]
    table = choices(prompts, workflows)
    assert table["models"] == [CHECKPOINTS[0]]
    assert [row["word"] for row in table["rows"]] == ["all"]


def test_description_of_two_passes():
    workflow = flow(
        lora=(0.8, 1.0),
        steps=8,
        cfg=2.5,
        second_pass={"steps": 4, "denoise": 0.5},
        image_nodes=(("ImageSharpen", {"sharpen_radius": 1, "sigma": 0.5, "alpha": 0.2}),),
    )
    said = describe(workflow)
    assert said.models == ("a",)
    assert said.loras == ("l 0.8",)
    assert said.sampling == (
        "8 steps, cfg 2.5, euler simple",
        "4 steps, cfg 2.5, euler simple, denoise 0.5",
    )
    assert said.steps == "8 + 4"
    assert said.extras == (
        "LatentUpscaleBy scale_by 1.5",
        "ImageSharpen sharpen_radius 1 sigma 0.5 alpha 0.2",
    )
    assert said.size == "32x32"
