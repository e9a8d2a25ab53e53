"""A designer for a real server's catalogue, from an `object_info` and prompts; nothing is rendered.

    flowloom catalogue snapshot --catalogue http://HOST:8188 --profile t2i \
        --out server/catalogue.json.gz
    flowloom run build_pairs --recipe server --input catalogue=server \
        --set prompts.prompts_file=prompts.txt [--set workflows_file=workflows/]
    flowloom run train_sft --recipe server --input catalogue=server --input pairs=PAIRS
"""

from __future__ import annotations

from flowloom.dataset.config import BuildPairsConfig, PriorConfig, PromptsConfig
from flowloom.designer.config import PolicyConfig, SFTConfig
from flowloom.recipes.recipe import Recipe


def server() -> Recipe:
    """SFT alone, on workflows as the text-to-image profile draws them: 6 minutes on 2 CPU cores.

    `build_pairs.prompts.prompts_file` is needed: the world of shapes has too few prompts.

    Designs are as varied as people's text-to-image workflows, and all valid; with
    `build_pairs.workflows_file` they follow a person's own. No score is known, so a prompt's words
    say nothing yet about what suits it.
    """
    return Recipe(
        build_pairs=BuildPairsConfig(
            prompts=PromptsConfig(num_train=1_000_000, num_test=100_000),
            # Real workflows have a median of 50 tokens and hardly ever more than 128.
            prior=PriorConfig(budget=128, steps=(), steps_weights=(), heun_weight=None),
            num_pairs=20_000,
            # Edits start from plain workflows of the embedded world's settings.
            mutated_frac=0.0,
            like_given=True,
            skip_invalid=True,
        ),
        train_sft=SFTConfig(
            policy=PolicyConfig(width=96, num_prompt_tokens=32, num_workflow_tokens=128),
            prior_steps=1000,
            best_steps=0,
            num_threads=2,
        ),
    )
