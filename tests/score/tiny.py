"""Tiny random models of the layouts that scorers load, written to a folder without the hub."""

import numpy as np
import torch

WORDS = (
    *("a", "an", "photo", "of", "and", "left", "three", "colored", "object", "cat", "dog", "car"),
    *("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"),
)


def pictures(count, seed=0, sizes=((32, 32), (40, 24), (20, 30))):
    rng = np.random.default_rng(seed)
    shapes = [sizes[k % len(sizes)] for k in range(count)]
    return [rng.uniform(-1, 1, (3, *shape)).astype(np.float32) for shape in shapes]


def clip_tokenizer(max_length=16):
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = sorted(bytes_to_unicode().values())
    # Ids from 1: OWLv2 takes a query that begins with 0 for padding.
    names = ["<|pad|>", "<|startoftext|>", *letters, *(c + "</w>" for c in letters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
                names.append(parts[0] + parts[1])
            parts[:2] = [parts[0] + parts[1]]
    names = [*dict.fromkeys(names), "<|endoftext|>"]
    vocab = {name: index for index, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def text_config(tokenizer, width=24):
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }


def vision_config(side=16, patch=8):
    return {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": side,
        "patch_size": patch,
    }


def drawn(model, sd, seed=0):
    """The model with matrices drawn anew, large enough for scores to differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(sd * torch.randn(weight.shape, generator=generator))
    return model.eval()


def write_clip(folder, width=24):
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = clip_tokenizer()
    config = CLIPConfig(
        text_config=text_config(tokenizer), vision_config=vision_config(), projection_dim=width
    )
    drawn(CLIPModel(config), 0.3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    processor.save_pretrained(folder)
    return str(folder)


def write_owl(folder):
    from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2Processor
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

    tokenizer = clip_tokenizer()
    config = Owlv2Config(
        text_config=text_config(tokenizer),
        vision_config=vision_config(side=24),
        projection_dim=24,
    )
    model = drawn(Owlv2ForObjectDetection(config), 0.3)
    with torch.no_grad():
        # Moderate offsets: boxes of many sizes.
        model.box_head.dense2.weight *= 0.3
    model.save_pretrained(folder)
    images = Owlv2ImageProcessorPil(size={"height": 24, "width": 24})
    Owlv2Processor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return str(folder)


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = (
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip


def write_qwen(folder):
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2Tokenizer,
    )
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    merges = [("Y", "e"), ("Ye", "s"), ("N", "o"), ("y", "e"), ("ye", "s"), ("n", "o")]
    names = [*sorted(bytes_to_unicode().values()), *(a + b for a, b in merges)]
    vocab = {name: index for index, name in enumerate(names)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=merges, extra_special_tokens=list(SPECIALS), chat_template=CHAT
    )
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIALS}
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    drawn(Qwen2_5_VLForConditionalGeneration(config), 0.2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images = Qwen2VLImageProcessorPil(
        patch_size=4,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 64, "longest_edge": 1024},
    )
    images.save_pretrained(folder)
    return str(folder)


def write_dino(folder):
    from transformers import (
        BertConfig,
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoProcessor,
        SwinConfig,
    )
    from transformers.models.grounding_dino import image_processing_pil_grounding_dino as images

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "##s", "hot", *WORDS]
    tokenizer = BertTokenizer(vocab={name: index for index, name in enumerate(names)})
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2],
            window_size=4, out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig(
            vocab_size=len(names), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=64,
        ),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_queries=6,
        max_text_len=32, num_feature_levels=4, encoder_n_points=2, decoder_n_points=2,
    )  # fmt: skip
    drawn(GroundingDinoForObjectDetection(config), 0.3).save_pretrained(folder)
    processor = images.GroundingDinoImageProcessorPil(
        size={"shortest_edge": 96, "longest_edge": 160}
    )
    GroundingDinoProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    return str(folder)
