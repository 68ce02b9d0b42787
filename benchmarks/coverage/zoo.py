"""The models of the coverage run, as data.

torchvision: all classifiers. timm: the smallest model (by parameters, models made for tests left
out) of every module of timm.models, and well-known ones beside. transformers: every architecture
that has a head for sequences, images or audio, with a tiny configuration; some at full size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

__all__ = ["ABSENT", "FAMILIES", "TIMM_MODULES", "ZOO", "Entry", "config_of"]

_TORCHVISION = """
    alexnet convnext_base convnext_large convnext_small convnext_tiny densenet121 densenet161
    densenet169 densenet201 efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3
    efficientnet_b4 efficientnet_b5 efficientnet_b6 efficientnet_b7 efficientnet_v2_l
    efficientnet_v2_m efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 mnasnet0_75
    mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_16gf
    regnet_x_1_6gf regnet_x_32gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf regnet_x_8gf
    regnet_y_128gf regnet_y_16gf regnet_y_1_6gf regnet_y_32gf regnet_y_3_2gf regnet_y_400mf
    regnet_y_800mf regnet_y_8gf resnet101 resnet152 resnet18 resnet34 resnet50 resnext101_32x8d
    resnext101_64x4d resnext50_32x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5
    shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1 swin_b swin_s swin_t swin_v2_b swin_v2_s
    swin_v2_t vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn vit_b_16 vit_b_32
    vit_h_14 vit_l_16 vit_l_32 wide_resnet101_2 wide_resnet50_2
"""

TIMM_MODULES: Mapping[str, str] = dict(
    pair.split("=")
    for pair in """
        beit=beit_base_patch16_224 byoanet=halonet_h1 byobnet=mobileone_s1
        cait=cait_xxs24_224 coat=coat_tiny convit=convit_tiny convmixer=convmixer_768_32
        convnext=convnext_zepto_rms cpubone=cpubone_nano crossvit=crossvit_tiny_240
        csatv2=csatv2 cspnet=cs3darknet_focus_s cspnext=cspnext_tiny davit=davit_tiny
        deepseek_vit=deepseek_vit_412m deit=deit_tiny_patch16_224 densenet=densenet121
        dla=dla46x_c dpn=dpn48b edgenext=edgenext_xx_small
        efficientformer=efficientformer_l1 efficientformer_v2=efficientformerv2_s0
        efficientnet=mobilenetv2_035 efficientvim=efficientvim_m1
        efficientvit_mit=efficientvit_b0 efficientvit_msra=efficientvit_m0
        eva=vit_tiny_patch16_dinov3_qkvb fasternet=fasternet_t0 fastvit=fastvit_t8
        focalnet=focalnet_tiny_srf gcvit=gcvit_xxtiny gemma4_vit=gemma4_vit_167m
        ghostnet=ghostnet_050 hardcorenas=hardcorenas_b hgnet=hgnetv2_b0
        hiera=hiera_tiny_224 hieradet_sam2=sam2_hiera_tiny hrnet=hrnet_w18_small
        iformer=iformer_t inception_next=inception_next_atto
        inception_resnet_v2=inception_resnet_v2 inception_v3=inception_v3
        inception_v4=inception_v4 lcnetv2=lcnetv2_small levit=levit_128s
        lowformer=lowformer_b0 mambaout=mambaout_femto maxxvit=maxvit_pico_rw_256
        metaformer=poolformerv2_s12 mlp_mixer=gmlp_ti16_224
        mobilenetv3=mobilenetv3_small_050 mobilenetv5=mobilenetv5_base
        mobilevit=mobilevit_xxs mvitv2=mvitv2_tiny
        naflexvit=naflexvit_base_patch16_parfac_gap nasnet=nasnetalarge nest=nest_tiny
        nextvit=nextvit_small nfnet=nf_regnet_b0 pit=pit_ti_224 pnasnet=pnasnet5large
        pvt_v2=pvt_v2_b0 qwen3_vit=qwen3_vit_88m rdnet=rdnet_tiny regnet=regnetx_002
        repghost=repghostnet_050 repvit=repvit_m1 res2net=res2next50 resnest=resnest14d
        resnet=resnet10t resnetv2=resnetv2_18 rexnet=rexnet_100 selecsls=selecsls42
        senet=legacy_seresnet18 sequencer=sequencer2d_s shvit=shvit_s1 sknet=skresnet18
        starnet=starnet_s050 swiftformer=swiftformer_xs
        swin_transformer=swin_tiny_patch4_window7_224
        swin_transformer_v2=swinv2_tiny_window16_256
        swin_transformer_v2_cr=swinv2_cr_tiny_224 tiny_vit=tiny_vit_5m_224
        tnt=tnt_s_legacy_patch16_224 tresnet=tresnet_m twins=twins_svt_small vgg=vgg11
        visformer=visformer_tiny vision_transformer=vit_tiny_patch16_224
        vision_transformer_hybrid=vit_tiny_r_s16_p8_224
        vision_transformer_relpos=vit_srelpos_small_patch16_224
        vision_transformer_sam=samvit_base_patch16_224 vitamin=vitamin_small_224
        volo=volo_d1_224 vovnet=ese_vovnet19b_slim_dw xception=legacy_xception
        xception_aligned=xception41p xcit=xcit_nano_12_p8_224
    """.split()
)
"""The smallest model of every module of timm.models that defines any."""

_TIMM = """
    resnet18 resnet26d resnet50 resnetaa50 resnext50_32x4d seresnet50 wide_resnet50_2
    ecaresnet50t vit_tiny_patch16_384 vit_small_patch16_224 vit_small_patch32_224
    vit_base_patch32_224 deit3_small_patch16_224 deit_small_patch16_224
    deit_tiny_distilled_patch16_224 swin_s3_tiny_224 swinv2_cr_small_224 convnext_tiny
    convnextv2_atto efficientnet_b0 efficientnet_lite0 mnasnet_100 mobilenetv2_100 mixnet_s
    tinynet_e mobilenetv3_large_100 mobilenetv4_conv_small mobilenetv4_hybrid_medium fbnetc_100
    regnety_008 regnetz_b16 rexnet_150 repvgg_a2 gernet_s coatnet_0_rw_224 maxvit_tiny_rw_224
    mixer_s32_224 mixer_b32_224 resmlp_12_224 eva02_tiny_patch14_224 cait_s24_224
    xcit_tiny_12_p8_224 vgg16_bn densenet169 darknet53 nfnet_f0 nf_resnet50 caformer_s18
    convformer_s18 poolformer_s12 beitv2_base_patch16_224 ghostnet_100 hrnet_w18
    lambda_resnet26t volo_d2_224 edgenext_small fastvit_sa12 tf_efficientnet_b0
    tf_mobilenetv3_small_100 skresnet34 dpn68 efficientnetv2_rw_t spnasnet_100 semnasnet_075
    resnetv2_50 mobilenet_edgetpu_v2_xs
"""

_TEXT = """
    albert arcee axk1 axk2 bart bert big_bird bigbird_pegasus biogpt bloom camembert canine
    cohere_compass_text convbert ctrl data2vec-text deberta deberta-v2 deepseek_v2 deepseek_v3
    diffllama distilbert doge electra ernie esm esmc eurobert exaone4 falcon flaubert fnet
    funnel gemma gemma2 gemma3 gemma3_text glm glm4 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox
    gpt_oss gptj gte helium hunyuan_v1_dense hunyuan_v1_moe ibert jamba jetmoe
    jina_embeddings_v3 layoutlm layoutlmv2 layoutlmv3 lilt llama longformer luke markuplm mbart
    megatron-bert minicpm3 minimax ministral ministral3 mistral mistral4 mixtral mobilebert
    modernbert modernbert-decoder modernvbert mpnet mpt mra mt5 mvp nemotron nomic_bert
    nystromformer olmo olmo2 olmo3 openai-gpt opt perceiver persimmon phi phi3 phimoe plbart
    qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_text qwen3_moe qwen3_next reformer rembert roberta
    roberta-prelayernorm roc_bert roformer seed_oss smollm3 squeezebert stablelm starcoder2 t5
    t5gemma t5gemma2 tapas ultrabert ultravbert umt5 xlm xlm-roberta xlm-roberta-xl xlnet xmod
    yoso zamba zamba2
"""
_IMAGE = """
    beit bit clip convnext convnextv2 cvt data2vec-vision deit dinat dinov2
    dinov2_with_registers donut-swin efficientnet focalnet hgnet_v2 hiera ijepa imagegpt levit
    metaclip_2 mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2 poolformer pp_lcnet pvt pvt_v2
    regnet resnet segformer shieldgemma2 siglip siglip2 swiftformer swin swinv2 textnet
    timm_wrapper vit vit_msn
"""
_AUDIO = """
    audio-spectrogram-transformer data2vec-audio hubert sew sew-d unispeech unispeech-sat
    wav2vec2 wav2vec2-bert wav2vec2-conformer wavlm whisper
"""

ABSENT: Mapping[str, str] = {
    "dinat": "needs natten, which has no wheel for CPUs",
    "layoutlmv2": "needs detectron2, which is not on PyPI",
    "t5": "its classifier fails in transformers 5.23: T5Config has no decoder_start_token_id",
    "timm_wrapper": "has no architecture of its own, it downloads one of timm",
}
"""Architectures of transformers that are left out, with the reason."""

# What makes a configuration tiny: set where it has the key, with a number in it.
_TINY: Mapping[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "d_latents",
         "word_embed_proj_dim", "pooler_hidden_size", "pooler_output_size", "projection_dim",
         "projection_size", "input_embedding_size", "true_hidden_size", "intra_bottleneck_size",
         "pronunciation_embed_dim", "shape_embed_dim", "entity_emb_size", "output_hidden_size",
         "classifier_proj_size", "cross_attention_hidden_size", "out_hidden_size"), 64),
    **dict.fromkeys(
        ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers",
         "decoder_layers", "num_decoder_layers", "num_self_attends_per_block", "depth"), 4),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
         "decoder_attention_heads", "num_self_attention_heads", "num_cross_attention_heads",
         "num_kv_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(
        ("intermediate_size", "d_ff", "d_inner", "dff", "ffn_dim", "ffn_hidden_size", "hidden_dim",
         "encoder_ffn_dim", "decoder_ffn_dim", "feed_forward_size",
         "shared_expert_intermediate_size"), 128),
    **dict.fromkeys(
        ("head_dim", "d_head", "d_kv", "kv_channels", "qk_nope_head_dim", "v_head_dim",
         "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("moe_intermediate_size", "kv_lora_rank", "q_lora_rank"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "qk_rope_head_dim": 16,
    "vocab_size": 1000,
    "entity_vocab_size": 1000,
}  # fmt: skip
_PARTS = ("text_config", "vision_config", "encoder", "decoder")

_STAGES = {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 2, 1]}
_WINDOWS = {"embed_dim": 32, "depths": [2, 2, 2, 2], "num_heads": [2, 4, 8, 16]}
_HYBRID = [*(2 * ["linear_attention"]), "hybrid", *(2 * ["linear_attention"]), "hybrid"]

# Where the rule does not give a configuration that the architecture accepts, or a tiny one.
_OWN: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v3", "minicpm3"), {"num_key_value_heads": 4}
    ),
    # SpecAugment and layer drop draw numpy's and Python's numbers, which no graph can hold.
    **dict.fromkeys(
        ("hubert", "sew", "unispeech", "unispeech-sat", "wav2vec2", "wav2vec2-bert",
         "wav2vec2-conformer", "wavlm"),
        {"apply_spec_augment": False, "layerdrop": 0.0},
    ),
    # Its sparse attention takes 704 tokens; with fewer, the model replaces it in its first call.
    "bigbird_pegasus": {"attention_type": "original_full"},
    "data2vec-audio": {"mask_time_prob": 0.0, "layerdrop": 0.0},
    "sew-d": {"apply_spec_augment": False},
    "big_bird": {"attention_type": "original_full"},  # what it switches to for short texts
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "mistral4": {"num_key_value_heads": 4, "head_dim": 32},
    "bit": {"hidden_sizes": [64, 128, 192, 256], "depths": [1, 1, 2, 1], "num_groups": 8},
    "convnext": _STAGES,
    "convnextv2": _STAGES,
    "cvt": {"embed_dim": [32, 64, 96], "depth": [1, 2, 3], "num_heads": [1, 2, 3]},
    "donut-swin": _WINDOWS,
    "efficientnet": {"image_size": 224, "width_coefficient": 1.0, "depth_coefficient": 1.0,
                     "hidden_dim": 1280},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "esmc": {"num_key_value_heads": 4},
    "focalnet": {"embed_dim": 32, "depths": [1, 1, 2, 1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "hiera": {"embed_dim": 32, "depths": [1, 1, 2, 1]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16},
    "lilt": {"hidden_size": 96},
    "ministral": {"head_dim": 16},
    "modernvbert": {"text_config": {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}},
    "nemotron": {"num_key_value_heads": 4},
    "poolformer": _STAGES,
    "pvt": {"hidden_sizes": [32, 64, 160, 256], "depths": [1, 1, 2, 1]},
    "qwen3_5": {"text_config": {"pad_token_id": 0}},
    "reformer": {"attn_layers": ["local", "lsh", "local", "lsh"], "attention_head_size": 16,
                 "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 48],
                 "max_position_embeddings": 128},
    "regnet": _STAGES | {"groups_width": 16},
    "resnet": _STAGES,
    "shieldgemma2": {"text_config": {"vocab_size": 11000}},
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "textnet": {"image_size": [224, 224]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": _HYBRID},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": _HYBRID},
}  # fmt: skip

# Where the source does not know the inputs; shorter where a scan over the tokens is a Python loop.
_INPUTS: Mapping[str, str] = {
    "canine": "input_ids:int64:128<1000,attention_mask:int64:128<2",
    **dict.fromkeys(("jamba", "zamba"), "input_ids:int64:32<1000,attention_mask:int64:32<2"),
    "wav2vec2-bert": "input_features:float32:100x160",
}

_FULL: Mapping[str, Mapping[str, Any]] = {
    "bert": {},  # bert-base-uncased
    "distilbert": {},  # distilbert-base-uncased
    "roberta": {"max_position_embeddings": 514, "type_vocab_size": 1},  # roberta-base
    "gpt2": {},
    "vit": {},  # vit-base-patch16-224
    "resnet": {},  # resnet-50
}
"""Full-size configurations: what differs from the defaults of the configuration class."""

_DEEP: Mapping[str, Mapping[str, Any]] = {
    "bert": {"num_hidden_layers": 48, "hidden_size": 512, "num_attention_heads": 8,
             "intermediate_size": 2048},
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One model. name: unique in the zoo. inputs: "" where the source knows them.

    is_tiny: the configuration is made tiny by the rule of this file. batch: samples, for the costs.
    """

    family: str
    name: str
    spec: str
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: str = ""
    is_tiny: bool = False
    batch: int = 32
    time_limit_s: int = 120


FAMILIES = ("torchvision", "timm", "transformers", "transformers, full size")


def _library(family: str, *names: str) -> list[Entry]:
    specs = [f"{family}:{name}" for name in dict.fromkeys(names)]
    return [Entry(family=family, name=spec, spec=spec) for spec in specs]


def _tiny(*types: str) -> list[Entry]:
    return [
        Entry(
            family="transformers", name=f"hf:{t}", spec=f"hf:{t}", is_tiny=True,
            inputs=_INPUTS.get(t, ""),
        )
        for t in types
        if t not in ABSENT
    ]  # fmt: skip


def _large(suffix: str, configs: Mapping[str, Mapping[str, Any]]) -> list[Entry]:
    return [
        Entry(
            family="transformers, full size", name=f"hf:{model_type}, {suffix}",
            spec=f"hf:{model_type}", config=config, time_limit_s=300,
        )
        for model_type, config in configs.items()
    ]  # fmt: skip


ZOO: Mapping[str, Entry] = {
    entry.name: entry
    for entry in [
        *_library("torchvision", *_TORCHVISION.split()),
        *_library("timm", *TIMM_MODULES.values(), *_TIMM.split()),
        *_tiny(*_TEXT.split(), *_IMAGE.split(), *_AUDIO.split()),
        *_large("full size", _FULL),
        *_large("48 layers", _DEEP),
    ]
}


def config_of(entry: Entry) -> dict[str, Any]:
    """The keyword arguments of the model's constructor or configuration."""
    if not entry.is_tiny:
        return dict(entry.config)
    model_type = entry.spec.partition(":")[2]
    default = import_module("transformers").CONFIG_MAPPING[model_type]().to_dict()
    own = {**_OWN.get(model_type, {}), **entry.config}
    tiny = _made_tiny(default)
    for part in _PARTS:
        if part in own:
            own[part] = {**tiny[part], **own[part]}
    return {**tiny, **own}


def _made_tiny(default: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a default configuration that the rule changes."""
    found: dict[str, Any] = {
        key: value for key, value in _TINY.items() if type(default.get(key)) is int
    }
    for part in _PARTS:
        if isinstance(default.get(part), Mapping):
            found[part] = _made_tiny(default[part])
    return found
