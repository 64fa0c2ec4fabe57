"""Memory predicted for models that others wrote, against the measurement of the same updates. For `make test-peers`."""

import contextlib
import copy
import importlib.util
import os
import warnings
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from gradaccum import accumulate
from gradaccum.memory import measure_memory, predict_memory

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
pytestmark = pytest.mark.peers
torch.set_num_threads(1)
if importlib.util.find_spec("torchvision") and not torch.backends.cuda.is_built():
    # Its wheels are built for CUDA: their operators do not load beside a torch without it, and only detection needs
    # them. What it says of their shapes does not load without their names either.
    OPERATORS = "nms qnms roi_align qroi_align _roi_align_backward roi_pool _roi_pool_backward ps_roi_align "
    OPERATORS += "_ps_roi_align_backward ps_roi_pool _ps_roi_pool_backward deform_conv2d _deform_conv2d_backward"
    with contextlib.suppress(RuntimeError):
        for name in OPERATORS.split():
            torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")
ROWS, LENGTH, VOCABULARY = 3, 12, 40


def tokens(rows, length=LENGTH):
    return torch.randint(2, VOCABULARY, (rows, length))


def transformers_model(name, changed=(), **sizes):
    """A model of transformers from a tiny config: its class is named, its config's class is the model's own."""
    kind = getattr(pytest.importorskip("transformers"), name)
    return kind(kind.config_class(**{"vocab_size": VOCABULARY, **sizes, **dict(changed)})).train()


LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MAMBA = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 16,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
}
PICTURE = {"image_size": 32, "patch_size": 8}
LANGUAGE = {
    "Mixtral": partial(transformers_model, "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2, **LLAMA),
    "GPT-2": partial(transformers_model, "GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, n_positions=32),
    "Llama": partial(transformers_model, "LlamaForCausalLM", **LLAMA),
    "Mistral": partial(transformers_model, "MistralForCausalLM", sliding_window=8, **LLAMA),
    "Qwen2": partial(transformers_model, "Qwen2ForCausalLM", **LLAMA),
    "Qwen3": partial(transformers_model, "Qwen3ForCausalLM", head_dim=8, **LLAMA),
    "Gemma2": partial(transformers_model, "Gemma2ForCausalLM", head_dim=8, **LLAMA),
    "Phi": partial(transformers_model, "PhiForCausalLM", **LLAMA),
    "GPT-NeoX": partial(transformers_model, "GPTNeoXForCausalLM", **BERT),
    "OPT": partial(
        transformers_model,
        "OPTForCausalLM",
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
    ),
    "BERT": partial(transformers_model, "BertForMaskedLM", **BERT),
    "RoBERTa": partial(transformers_model, "RobertaForMaskedLM", **BERT),
    "DistilBERT": partial(transformers_model, "DistilBertForMaskedLM", dim=32, hidden_dim=48, n_layers=2, n_heads=4),
    "ModernBERT": partial(transformers_model, "ModernBertForMaskedLM", pad_token_id=0, **BERT),
    "T5": partial(transformers_model, "T5ForConditionalGeneration", **T5),
    "Mamba": partial(transformers_model, "MambaForCausalLM", **MAMBA),
    "Mamba2": partial(transformers_model, "Mamba2ForCausalLM", num_heads=4, head_dim=8, n_groups=1, **MAMBA),
}


def language(name, rows):
    return LANGUAGE[name](), {"input_ids": (ids := tokens(rows)), "labels": ids.clone()}


def lora(rows):
    peft = pytest.importorskip("peft")
    model, batch = language("Llama", rows)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))
    return model.train(), batch


def lora_gpt(rows):
    peft = pytest.importorskip("peft")
    model, batch = language("GPT-2", rows)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)), batch


def whisper(rows):
    model = transformers_model("WhisperForConditionalGeneration", **WHISPER)
    return model, {"input_features": torch.rand(rows, 8, 20), "labels": tokens(rows)}


def vision(name, rows, **sizes):
    model = transformers_model(name, num_labels=5, **sizes)
    return model, {"pixel_values": torch.rand(rows, 3, 32, 32), "labels": torch.randint(5, (rows,))}


def clip(rows):
    parts = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = parts | {"vocab_size": VOCABULARY, "max_position_embeddings": 16}
    options = {"text_config": text, "vision_config": parts | PICTURE, "projection_dim": 16}
    model = transformers_model("CLIPModel", **options)
    pictures = torch.rand(rows, 3, 32, 32)
    return model, {"input_ids": tokens(rows), "pixel_values": pictures, "return_loss": True}


def patch_tst(rows):
    sizes = {
        "context_length": 32,
        "prediction_length": 8,
        "patch_length": 8,
        "patch_stride": 8,
        "num_input_channels": 3,
    }
    parts = {"d_model": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}
    kind = pytest.importorskip("transformers").PatchTSTForPrediction
    model = kind(kind.config_class(**sizes, **parts)).train()
    return model, {"past_values": torch.rand(rows, 32, 3), "future_values": torch.rand(rows, 8, 3)}


def vision_models():
    return pytest.importorskip("torchvision").models


def torchvision_model(name, rows, size=32, **options):
    models = vision_models()
    model = models.get_model(name, weights=None, num_classes=5, **options).train()
    return model, {"pixel_values": torch.rand(rows, 3, size, size), "labels": torch.randint(5, (rows,))}


def small_vision(name, rows):
    models = vision_models()
    if name == "ConvNeXt":
        kind = models.convnext.CNBlockConfig
        model = models.ConvNeXt([kind(16, 32, 2), kind(32, None, 2)], stochastic_depth_prob=0.1, num_classes=5)
    elif name == "Swin":
        model = models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5)
    else:
        model = models.DenseNet(8, (2, 2), 16, drop_rate=0.1, num_classes=5)
    return model.train(), torchvision_model("resnet18", rows)[1]


def segmentation(name, rows):
    models = vision_models().segmentation
    model = getattr(models, name)(weights=None, weights_backbone=None, num_classes=5).train()
    return model, {"pixel_values": torch.rand(rows, 3, 32, 32), "labels": torch.randint(5, (rows, 32, 32))}


MODELS = {
    **{name: partial(language, name) for name in LANGUAGE},
    "LoRA": lora,
    "LoRA of GPT-2": lora_gpt,
    "Whisper": whisper,
    "CLIP": clip,
    "ViT": partial(vision, "ViTForImageClassification", **BERT, **PICTURE),
    "Swin of transformers": partial(
        vision,
        "SwinForImageClassification",
        patch_size=4,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
        image_size=32,
    ),
    "PatchTST": patch_tst,
    "DINOv2": partial(
        vision, "Dinov2ForImageClassification", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **PICTURE
    ),
    **{name: partial(torchvision_model, name) for name in ("resnet18", "resnet50", "efficientnet_b0", "vgg11_bn")},
    **{
        name: partial(torchvision_model, name)
        for name in ("mobilenet_v3_small", "regnet_y_400mf", "shufflenet_v2_x0_5")
    },
    **{name: partial(small_vision, name) for name in ("ConvNeXt", "Swin", "DenseNet")},
    "swin_v2_t": partial(torchvision_model, "swin_v2_t", size=64),
    "vit_b_16": partial(torchvision_model, "vit_b_16", image_size=32),
    **{
        name: partial(segmentation, name)
        for name in ("deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large")
    },
}
OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "foreach": partial(torch.optim.AdamW, foreach=True),
    "momentum": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "momentum foreach": partial(torch.optim.SGD, lr=0.01, momentum=0.9, foreach=True),
    "SGD": partial(torch.optim.SGD, lr=0.01),
}


def ones(batch):
    return batch | {"attention_mask": torch.ones(batch["input_ids"].shape, dtype=torch.long)}


def padded(batch):
    rows, length = batch["input_ids"].shape
    return batch | {"attention_mask": (torch.arange(length) < torch.arange(length, length - rows, -1)[:, None]).long()}


def checkpointed(model, reentrant):
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()


MASKS = {"ones": ones, "padded": padded}


def build(model, variant="", optimizer="AdamW", count=1):
    torch.manual_seed(0)
    made, batch = MODELS[model](ROWS)
    if "checkpoint" in variant:
        checkpointed(made, "reentrant" in variant)
    batch = next((change(batch) for name, change in MASKS.items() if name in variant), batch)
    if "no cache" in variant:
        batch["use_cache"] = False
    trained = OPTIMIZERS[optimizer]([each for each in made.parameters() if each.requires_grad])
    window = [batch, *(copy.copy(batch) for _ in range(count - 1))]
    for each in window[1:]:
        each.update({name: x.clone() for name, x in batch.items() if isinstance(x, torch.Tensor)})
    if "accelerate" in variant:
        accelerate = pytest.importorskip("accelerate")
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=count)
        return (*accelerator.prepare(made, trained), window, accelerator)
    return made, trained, window, torch.optim.swa_utils.AveragedModel(made) if "average" in variant else None


def loss_of(model, batch, device="cpu", autocast=False):
    with torch.autocast(device, torch.bfloat16) if autocast else contextlib.nullcontext():
        if "labels" not in batch or type(model).__module__.partition(".")[0] != "torchvision":
            return model(**batch).loss
        out = model(batch["pixel_values"])
        return cross_entropy(out if isinstance(out, torch.Tensor) else out["out"], batch["labels"])


def step(model, optimizer, window, beside, variant="", device="cpu"):
    one = partial(loss_of, device=device, autocast="autocast" in variant)
    if "accelerate" in variant:
        for batch in window:
            with beside.accumulate(model):
                beside.backward(one(model, batch))
                optimizer.step()
                optimizer.zero_grad()
        return
    if "accumulate" in variant:
        result = accumulate(model, window, lambda batch: one(model, batch) * ROWS, lambda batch: ROWS)
        assert result.count == ROWS * len(window)
    else:
        for batch in window:
            (one(model, batch) / len(window)).backward()
    optimizer.step()
    optimizer.zero_grad()
    if beside is not None:
        beside.update_parameters(model)


def whole(report):
    return report.start_bytes, report.peak_bytes, report.end_bytes, report.at_peak


def check(model, variant="", optimizer="AdamW", count=1):
    make = partial(build, model, variant, optimizer, count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        predicted = predict_memory(make, partial(step, variant=variant), device="cpu")
        built, reports = make(), []
        known = [each for each in built if each is not None and type(each).__name__ != "Accelerator"]
        for _ in range(2):
            with measure_memory(*(each for each in flat(known))) as memory:
                step(*built, variant=variant)
            reports.append(whole(memory))
        del built
        on_cuda = predict_memory(make, partial(step, variant=variant, device="cuda"))
    return predicted, reports, on_cuda


def flat(known):
    for each in known:
        if isinstance(each, list):
            yield from ([x for x in batch.values() if isinstance(x, torch.Tensor)] for batch in each)
        else:
            yield each


TEXT = "ones", "padded", "no cache", "autocast", "checkpoint", "checkpoint reentrant"
ALSO = [
    *((name, variant, "AdamW", 1) for name in ("GPT-2", "Llama", "T5") for variant in TEXT),
    *(("BERT", variant, "AdamW", 1) for variant in TEXT if variant != "no cache"),
    *((name, variant, "SGD", 1) for name in ("Mistral", "Qwen2") for variant in ("padded", "checkpoint")),
    *((name, variant, "SGD", 1) for name in ("Whisper", "ViT", "LoRA") for variant in ("checkpoint", "autocast")),
    ("resnet18", "autocast", "SGD", 1),
    ("GPT-2", "checkpoint autocast", "AdamW", 1),
    ("Llama", "checkpoint reentrant autocast", "AdamW", 1),
    *((name, "accumulate", "momentum", 2) for name in ("GPT-2", "BERT", "LoRA", "resnet18")),
    *((name, "accelerate", "foreach", 2) for name in ("GPT-2", "LoRA", "resnet18")),
    *((name, "average", "SGD", 1) for name in ("Llama", "BERT", "resnet18")),
    ("GPT-2", "accumulate autocast ones", "foreach", 2),
    *((name, "autocast", "momentum foreach", 1) for name in ("ConvNeXt", "vit_b_16", "efficientnet_b0")),
]


def test_there_are_enough_runs():
    assert len({*ALSO}) + len(MODELS) == len(ALSO) + len(MODELS) >= 60


@pytest.mark.parametrize("model", MODELS)
def test_a_foreign_model_is_predicted(model):
    for variant, optimizer, count in [("", "AdamW", 1), *(row[1:] for row in ALSO if row[0] == model)]:
        predicted, measured, on_cuda = check(model, variant, optimizer, count)
        assert [whole(predicted.first), whole(predicted)] == measured, (variant, optimizer)
        assert predicted.guessed == []
        assert on_cuda.reserved_bytes > on_cuda.peak_bytes * 0.99 > predicted.start_bytes * 0.99
        if "checkpoint" in variant:
            make, take = partial(build, model, optimizer=optimizer), partial(step, variant=variant, device="cuda")
            assert on_cuda.peak_bytes <= predict_memory(make, take).peak_bytes
