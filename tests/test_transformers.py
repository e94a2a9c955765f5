# SPDX-License-Identifier: Apache-2.0
"""Models of transformers whose attention is registered by mha_c.torch.register_transformers.

The judge is the definition of attention in float64 in the same model; what an error may be, torch's own function in
float32 says. Before that, each case is shown to notice: without a trait of its attention the answer is another one.
"""

import copy
import pickle
import re
import sys
import threading

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision_operators")
transformers = pytest.importorskip("transformers")
from hugging_face import CASES, REFUSED, build, decode, encode, examine, padding, register_definition, tokens  # noqa: E402
from mha_c import _core  # noqa: E402
from mha_c.torch import attention, register_transformers, replace_attention, replace_layers  # noqa: E402
from mha_c.torch import coverage as coverage_of_layers  # noqa: E402

TIMES_TORCHS_ERROR = 3
TIMES_THE_TOLERANCE = 1000

transformers.logging.set_verbosity_error()
register_definition()


@pytest.fixture
def coverage():
    return register_transformers("mha_c")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model.__name__)
def test_a_model_computes_the_same_here(case, coverage):
    found = examine(case, coverage, "mha_c")
    tolerance = TIMES_TORCHS_ERROR * found.theirs
    assert {trait for trait, change in found.without.items() if change >= TIMES_THE_TOLERANCE * tolerance} == set(
        case.traits)
    assert {trait for trait, change in found.without.items() if change > 0} == set(case.traits)
    assert found.eager <= tolerance  # what transformers means is what is defined
    assert found.ours <= tolerance
    assert (found.here, found.left) == (case.calls, 0)


def case_of(model_class):
    return next(case for case in CASES if case.model is model_class)


def ready(model_class, name="mha_c"):
    model = build(case_of(model_class))
    model.set_attn_implementation(name)
    return model


@pytest.mark.parametrize(("model_class", "config"), REFUSED, ids=lambda given: getattr(given, "__name__", ""))
def test_models_that_are_refused(model_class, config, coverage):
    model = model_class(config)
    model.set_attn_implementation("mha_c")
    with pytest.raises(NotImplementedError, match=f'the model of a {type(config).__name__} .*attn_implementation="eager"'):
        model(input_ids=tokens())


def attention_of_a_layer(queries=4, keys=4, **arguments):
    """A call such as models make, of a layer that looks back."""
    function = transformers.AttentionInterface()["mha_c"]
    key = torch.randn(2, 4, keys, 8)
    return function(torch.nn.Identity(), torch.randn(2, 4, queries, 8), key, key, None, **arguments)


@pytest.mark.parametrize("arguments", [
    {"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"cu_seq_lens_q": torch.arange(3)}, {"indices": torch.arange(3)}, {"no_such_thing": 0},
    {"sliding_window": 3}, {"keys": 6}, {"is_causal": True, "keys": 6}])
def test_arguments_that_are_refused(arguments, coverage):
    """A window that no mask tells of, and a causal order that it cannot be known where it ends."""
    with pytest.raises(NotImplementedError, match="Identity asks for "):
        attention_of_a_layer(**arguments)


@pytest.mark.parametrize("arguments", [
    {"softcap": None, "s_aux": None}, {"position_ids": torch.arange(4), "use_cache": True}, {"output_router_logits": 1},
    {"sliding_window": 4}, {"keys": 6, "is_causal": False}, {"queries": 1, "keys": 6}])
def test_arguments_that_are_understood(arguments, coverage):
    output, weights = attention_of_a_layer(**arguments)
    assert output.shape == (2, arguments.get("queries", 4), 4, 8) and weights is None


def test_queries_left_out_after_the_mask_was_made(coverage):
    """Gemma 4 goes on with the last queries alone, from the layer on that reads keys of others."""
    config = transformers.Gemma4TextConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, head_dim=8,
        num_key_value_heads=2, global_head_dim=8, num_global_key_value_heads=2, sliding_window=6,
        vocab_size_per_layer_input=90, hidden_size_per_layer_input=8, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2)
    model = transformers.Gemma4ForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)

    def last(name):
        model.set_attn_implementation(name)
        cache = transformers.StaticCache(config=config, max_cache_len=20)
        with torch.no_grad():
            return model(tokens(), cache=cache, use_cache=True, logits_to_keep=1).logits

    assert torch.allclose(last("eager"), last("mha_c"), atol=1e-5)
    with pytest.raises(NotImplementedError, match="Gemma4TextAttention asks for is_causal without a mask"):
        model(tokens(), logits_to_keep=3)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}, {"num_beams": 3}])
@pytest.mark.parametrize("model_class", [transformers.LlamaForCausalLM, transformers.GPT2LMHeadModel,
                                         transformers.MistralForCausalLM])
def test_generation(model_class, options, coverage):
    case = next(case for case in CASES if case.model.__name__.startswith(model_class.__name__[:4]))
    model = build(case._replace(model=model_class))
    exact = copy.deepcopy(model).double()
    model.set_attn_implementation("mha_c")
    exact.set_attn_implementation("defined")
    prompt = {"input_ids": tokens(), "attention_mask": padding("left"), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**prompt, **options), exact.generate(**prompt, **options))
    assert {(row.here, row.left, row.reason) for row in coverage.rows} == {(1, 7, "one query")}


def test_weights_where_they_are_asked_for(coverage):
    for model_class in transformers.BertModel, transformers.LlamaForCausalLM, transformers.CLIPTextModel:
        model = ready(model_class)
        exact = copy.deepcopy(model).double()
        exact.set_attn_implementation("defined")
        asked = {"input_ids": tokens(), "attention_mask": padding("right"), "output_attentions": True}
        with torch.no_grad():
            ours, wanted = model(**asked).attentions, exact(**asked).attentions
        assert len(ours) == len(wanted) == 2
        for weights, right in zip(ours, wanted, strict=True):
            assert (weights - right).abs().max() < 1e-5
    assert coverage.here == 6 and coverage.left == 0  # not counted twice


def test_weights_are_those_before_dropout(coverage):
    weights = attention_of_a_layer(dropout=0.5, output_attentions=True)[1]
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 4)) and coverage.rows[0].reason == "dropout"


def test_rows_of_the_coverage(coverage):
    with torch.no_grad():
        encode(ready(transformers.BertModel))
        encode(ready(transformers.DistilBertModel))  # whose layers have no numbers
    assert [(row.module, row.class_name, row.here) for row in coverage.rows] == [
        ("layer 0", "BertSelfAttention", 1), ("layer 1", "BertSelfAttention", 1), ("", "DistilBertSelfAttention", 2)]


def test_a_models_coverage_says_where_its_calls_are_counted(coverage):
    model = ready(transformers.BertModel)
    assert str(coverage_of_layers(model)).endswith(
        '\n\nCalls through attn_implementation="mha_c" are counted in the coverage that register_transformers() returned.')
    assert "register" not in str(coverage_of_layers(ready(transformers.BertModel, "sdpa")))
    replaced = replace_layers(ready(transformers.BertModel))
    with torch.no_grad():
        encode(replaced)
    assert coverage_of_layers(replaced).here == 2 and "are counted in" in str(coverage_of_layers(replaced))


@pytest.mark.parametrize(("model_class", "replace"), [
    (transformers.BertModel, replace_attention), (transformers.GPT2Model, replace_attention),
    (transformers.GPT2Model, replace_layers)])
def test_models_without_layers_to_replace(model_class, replace):
    """What the message says computes their attention, or their layers where they are known."""
    model, is_known = ready(model_class, "sdpa"), model_class is transformers.BertModel
    with pytest.raises(ValueError) as error:
        replace(model)
    name = model_class.__name__
    assert re.match(rf"there is no (layer|torch\.nn\.MultiheadAttention) to replace in this {name}", str(error.value))
    register = 'mha_c.torch.register_transformers(), and load the model with attn_implementation="mha_c"'
    if is_known:
        assert str(error.value).endswith(
            f". Call mha_c.torch.replace_layers(model) for its whole layers; for its attention alone, call {register}")
        assert replace_layers(copy.deepcopy(model))
    else:
        assert str(error.value).endswith(f". Call {register}")
    found = register_transformers()
    loaded = model_class._from_config(model.config, attn_implementation="mha_c").eval()
    with torch.no_grad():
        loaded(input_ids=tokens())
    assert found.here > 0


def test_training_is_torchs(coverage):
    gradients = []
    for name in "mha_c", "sdpa":
        model = ready(transformers.BertModel, name).train()
        torch.manual_seed(0)  # for dropout
        encode(model).square().mean().backward()
        gradients.append(model.encoder.layer[0].attention.self.query.weight.grad)
    assert torch.equal(*gradients)
    assert {row.reason for row in coverage.rows} == {"gradients"} and coverage.here == 0


def test_frozen_parameters_need_no_gradients(coverage):
    encode(ready(transformers.BertModel).requires_grad_(False))
    assert (coverage.here, coverage.left) == (2, 0)


@pytest.mark.parametrize(("reason", "context"), [
    ("", torch.inference_mode), ("autocast", lambda: torch.autocast("cpu")), ("tensors on meta", lambda: torch.device("meta"))])
def test_contexts(reason, context, coverage):
    with torch.no_grad(), context():
        model = transformers.BertModel(case_of(transformers.BertModel).config).eval()
        model.set_attn_implementation("mha_c")
        output = model(input_ids=tokens().to(model.device))[0]
    assert output.shape == (3, 12, 32) and {row.reason for row in coverage.rows} == {reason}
    assert (coverage.here, coverage.left) == ((0, 2) if reason else (2, 0))


def test_inside_a_block(coverage):
    """The layer's own call is the innermost, and counts; what it leaves to torch reaches the block."""
    with attention() as block:
        encode(ready(transformers.BertModel).requires_grad_(False))
        encode(ready(transformers.BertModel))
    assert (coverage.here, coverage.left) == (2, 2) and (block.here, block.left) == (0, 2)


def test_errors_after_the_checks_are_not_hidden(coverage, monkeypatch):
    def fail(*_):
        raise RuntimeError("a fault in the kernels")

    model = ready(transformers.BertModel)
    with torch.no_grad(), monkeypatch.context() as planted:
        planted.setattr(_core, "scaled_dot_product_attention", fail)
        with pytest.raises(RuntimeError, match="a fault in the kernels"):
            encode(model)
    assert (coverage.here, coverage.left) == (0, 0)
    with torch.no_grad():
        encode(model)
        assert (coverage.here, coverage.left) == (2, 0)
        assert not torch.overrides._get_current_function_mode_stack()


def test_a_compiled_model_computes_with_torch():
    coverage = register_transformers("compiled_by_torch")
    model = ready(transformers.BertModel, "compiled_by_torch")
    with torch.no_grad():
        want = encode(model)
        here = coverage.here
        got = encode(torch.compile(model, backend="eager", fullgraph=True))
    assert torch.allclose(got, want, atol=1e-5)
    assert here == coverage.here == 2


def test_one_query_in_a_graph(coverage):
    function, query, key = transformers.AttentionInterface()["mha_c"], torch.randn(2, 4, 1, 8), torch.randn(2, 4, 6, 8)
    with torch.no_grad():
        compiled = torch.compile(function, backend="eager", fullgraph=True)(torch.nn.Identity(), query, key, key, None)
        assert coverage.left == 0
        assert torch.equal(compiled[0], function(torch.nn.Identity(), query, key, key, None)[0])


def test_each_name_counts_by_itself():
    first, second = register_transformers("first_name"), register_transformers("second_name")
    with torch.no_grad():
        encode(ready(transformers.BertModel, "first_name"))
        decode(ready(transformers.LlamaForCausalLM, "second_name"))
        again = register_transformers("first_name")
        encode(ready(transformers.BertModel, "first_name"))
    assert (first.here, second.here, again.here) == (2, 4, 2)


def test_copies_and_pickles(coverage):
    model = ready(transformers.BertModel)
    with torch.no_grad():
        want = encode(model)
        for copied in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
            assert torch.equal(encode(copied), want)
    assert (coverage.here, coverage.left) == (6, 0)


def test_threads(coverage):
    model, results = ready(transformers.LlamaForCausalLM), []

    def run():
        with torch.no_grad():
            results.append(decode(model))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and all(torch.equal(result, results[0]) for result in results)
    assert (coverage.here, coverage.left) == (32, 0)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2", "my_flash", "two words", "org/kernel", "", "paged|mha_c"])
def test_names_that_mean_something_to_transformers(name):
    with pytest.raises(ValueError, match="name must be an identifier without a meaning in transformers"):
        register_transformers(name)


def test_a_name_is_a_string():
    with pytest.raises(TypeError, match="name must be a str, but got <class 'int'>"):
        register_transformers(1)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers, which is not installed: `pip install transformers`"):
        register_transformers()


def test_an_older_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", None)
    with pytest.raises(ImportError, match="cannot be imported: .* register_transformers needs transformers 4.57 or later"):
        register_transformers()
