# SPDX-License-Identifier: Apache-2.0
"""What several test files need: random inputs, torch as the judge, the tolerance, child processes."""

import copy
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import reference

REPOSITORY = Path(__file__).parent.parent


# ---------------------------------------------------------------------------------------------- inputs


def normal(shape, dtype="float32", seed=0):
    """Standard normal numbers; the same shape, dtype and seed give the same ones."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def inputs(n, length, s, e, *, kdim=None, vdim=None, batch_first=True, dtype="float32", seed=0, same=False):
    """query, key and value of a call; n None for unbatched ones. `same` makes them one and the same array."""
    def one(steps, features, number):
        shape = (steps, features) if n is None else (n, steps, features) if batch_first else (steps, n, features)
        return normal(shape, dtype, seed * 10 + number)
    query = one(length, e, 1)
    return (query, query, query) if same else (query, one(s, e if kdim is None else kdim, 2), one(
        s, e if vdim is None else vdim, 3))


def randomize(module, seed=0):
    """Gives every parameter random numbers of a useful size: new layers have zero biases, which hide mistakes."""
    state = {name: normal(array.shape, np.asarray(array).dtype, seed + 77) / np.sqrt(max(array.shape[-1], 1)).astype(
        np.asarray(array).dtype) for name, array in module.state_dict().items()}
    module.load_state_dict(state)
    return module


def layer(embed_dim, num_heads, *, seed=0, training=False, **options):
    """A mha_c.MultiheadAttention with random parameters, evaluating unless told otherwise."""
    import mha_c
    return randomize(mha_c.MultiheadAttention(embed_dim, num_heads, **options), seed).train(training)


def causal_mask(length, s):
    """True where key s is hidden from query l."""
    return np.arange(s) > np.arange(length)[:, None]


def bits(state):
    """What a state dict holds, so that NaNs compare too."""
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in state.items()}


# ---------------------------------------------------------------------------------------------- torch


def to_torch(value):
    """Arrays become tensors (any strides, native byte order); everything else, dtypes apart, stays what it is."""
    import torch
    if isinstance(value, np.ndarray):
        array = np.array(value, dtype=value.dtype.newbyteorder("="), order="C", copy=True)
        if array.dtype.name == "bfloat16":  # which torch does not take from NumPy
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)
    if isinstance(value, np.dtype) or isinstance(value, type) and issubclass(value, np.generic):
        return getattr(torch, np.dtype(value).name)
    return value


def to_numpy(tensor):
    """The numbers of a tensor, in its dtype."""
    import torch
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view("bfloat16")
    return tensor.numpy()


def in_float32(module):
    """A copy of a layer of a half that keeps float32 numbers, and multiplies what the layer multiplies."""
    halves = {array.dtype.name for array in module.parameters()}
    wide = copy.deepcopy(module).float()
    if hasattr(wide, "matmul_precision") and wide.matmul_precision is None and "bfloat16" in halves:
        wide.matmul_precision = "bfloat16"
    return wide


def is_half(dtype):
    """Whether numbers of this dtype have 16 bits, and are float32 between the steps of a layer."""
    return np.dtype(dtype).name in ("bfloat16", "float16")


def is_float(array):
    """Whether it holds floating-point numbers. NumPy does not know bfloat16 for a float."""
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def eps_of(dtype):
    """The distance of 1 from the next number of a dtype."""
    return float(np.spacing(np.ones((), dtype)))


def tiny_of(dtype):
    """The smallest normal number of a dtype."""
    return float(np.finfo("float32" if dtype == "bfloat16" else dtype).tiny)  # which have the same exponents


def torch_twin(module):
    """The torch layer with the constructor arguments and parameters of `module`, as far as torch can express them."""
    import torch
    dtype = np.asarray(module.out_proj.weight).dtype
    twin = torch.nn.MultiheadAttention(
        module.embed_dim, module.num_heads, dropout=module.dropout, bias=module.in_proj_bias is not None,
        add_bias_kv=module.bias_k is not None, add_zero_attn=module.add_zero_attn, kdim=module.kdim, vdim=module.vdim,
        batch_first=module.batch_first, dtype=getattr(torch, dtype.name))
    twin.load_state_dict({name: to_torch(np.array(array)) for name, array in module.state_dict().items()})
    return twin.train(module.training)


def call_torch(twin, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
               average_attn_weights=True, is_causal=False):
    """Calls a torch layer as mha_c would be called, and returns arrays.

    Where mha_c differs from torch on purpose (a float mask of another dtype; is_causal as a real mask), torch is asked
    the equivalent question: the mask in the dtype of the query, the causal mask spelt out.
    """
    import torch
    if is_causal:
        s, length = key.shape[1 if query.ndim == 3 and twin.batch_first else 0], query.shape[
            1 if query.ndim == 3 and twin.batch_first else 0]
        hidden = causal_mask(length, s)
        if attn_mask is None:
            attn_mask = hidden
        elif attn_mask.dtype == bool:
            attn_mask = attn_mask | hidden
        else:
            attn_mask = np.where(hidden, -np.inf, attn_mask)
    masks = [m if m is None or m.dtype == bool else m.astype(query.dtype) for m in (key_padding_mask, attn_mask)]
    tensors = {id(a): to_torch(a) for a in (query, key, value)}  # the same array stays the same tensor
    with torch.no_grad():
        output, weights = twin(tensors[id(query)], tensors[id(key)], tensors[id(value)], to_torch(masks[0]),
                               need_weights, to_torch(masks[1]), average_attn_weights)
    return to_numpy(output), None if weights is None else to_numpy(weights)


def outcome(call):
    """What a call does, so that two calls can be compared: its result, or the exception."""
    try:
        return SimpleNamespace(result=call(), error=None)
    except Exception as error:  # noqa: BLE001 - the point is to compare whatever comes
        return SimpleNamespace(result=None, error=error)


def torch_words(error):
    """torch's message as mha_c says it: a shape is printed as a tuple."""
    def as_tuple(match):
        sizes = [int(n) for n in match[1].split(",") if n.strip()]
        return str(tuple(sizes))
    return re.sub(r"torch\.Size\(\[([^\]]*)\]\)", as_tuple, str(error))


# ---------------------------------------------------------------------------------------------- tolerance


def rounding_scale(module, query, key, value, *, batch_first=None, **call):
    """What one rounding error can do to (output, weights): the size of the sums behind each number, with all terms
    taken as positive, times the machine's epsilon.

    An error of eps * |q| |k| in a score changes its weight by that factor, hence `1 + 2 * largest score`. The output is
    the reference's own, with every parameter and input replaced by its absolute value.
    """
    batch_first = module.batch_first if batch_first is None else batch_first
    if query.ndim == 2:
        query, key, value = query[None], key[None], value[None]
    elif not batch_first:
        query, key, value = (x.swapaxes(0, 1) for x in (query, key, value))
    positive = {name: np.abs(np.asarray(array)) for name, array in module.state_dict().items()}
    grouped = getattr(module, "num_kv_heads", None)
    state = module.state_dict()
    per_head = dict(call, need_weights=True, average_attn_weights=False, masked_rows="zero", batch_first=True)
    weights = reference.multi_head_attention(
        state, module.num_heads, query, key, value, num_kv_heads=grouped, add_zero_attn=module.add_zero_attn,
        **per_head)[1]
    scores = reference.attention_scores(positive, module.num_heads, np.abs(query), np.abs(key), grouped,
                                        module.add_zero_attn)
    masks = {name: call[name] for name in ("attn_mask", "key_padding_mask") if call.get(name) is not None}
    if masks:
        s = key.shape[1]
        mask = np.abs(reference.combined_mask((*scores.shape[:3], s), reference.computed_in(query.dtype), **masks))
        scores[..., :s] += np.where(mask < 100, mask, 0)  # beyond that no score is left to round, or no key
    worst = 1 + 2 * scores.max(axis=-1, keepdims=True, initial=0.0)
    output = reference.attention_output(positive, module.num_heads, weights * worst, np.abs(value), grouped,
                                        module.add_zero_attn)
    return output, weights * worst


#: How many times rounding_scale() a result may be off. torch itself needs up to 0.6 on random inputs and 2.4 where all
#: keys are alike, so that their roundings add up; wherever it is called too, it is held to half of this. A missing or a
#: wrong term is off by thousands; how accurate results are is measured elsewhere, in test_accuracy.py.
ROUNDINGS = 6.0


def assert_matches(module, result, query, key, value, *, roundings=ROUNDINGS, what="", **call):
    """Holds one result (output, weights) against the definition: shapes, dtypes, NaNs and infinities in the same
    places, and no number further off than `roundings` rounding errors."""
    options = dict(batch_first=module.batch_first, num_kv_heads=getattr(module, "num_kv_heads", None),
                   add_zero_attn=module.add_zero_attn, masked_rows=getattr(module, "masked_rows", "torch"))
    expected = reference.multi_head_attention(module.state_dict(), module.num_heads, query, key, value,
                                              **call, **options)
    masks = {name: call[name] for name in ("key_padding_mask", "attn_mask", "is_causal") if name in call}
    scale, weights_scale = rounding_scale(module, query, key, value, **masks)
    if call.get("average_attn_weights", True):
        weights_scale = weights_scale.mean(axis=1)
    if query.ndim == 2:
        scale, weights_scale = scale[0], weights_scale[0]
    elif not module.batch_first:
        scale = scale.swapaxes(0, 1)
    assert isinstance(result, tuple) and len(result) == 2
    for name, got, want, size in zip(("output", "weights"), result, expected, (scale, weights_scale)):
        if want is None:
            assert got is None, f"{what} {name}: not asked for"
            continue
        assert got.shape == want.shape and got.dtype == query.dtype.newbyteorder("="), (
            f"{what} {name}: {got.shape} {got.dtype} instead of {want.shape} {query.dtype}")
        eps = eps_of(query.dtype)
        finite = np.isfinite(want)
        np.testing.assert_array_equal(got.astype(want.dtype)[~finite], want[~finite], err_msg=f"{what} {name}")
        allowed = roundings * eps * size + tiny_of(query.dtype)
        off = np.abs(got.astype(want.dtype) - want) / allowed
        worst = off[finite].max(initial=0.0)
        assert np.isfinite(got[finite]).all() and worst <= 1, (
            f"{what} {name}: {worst:.3g} times what rounding explains, at element {int(np.argmax(off))}")


# ---------------------------------------------------------------------------------------------- processes

#: Seconds after which a child is taken to hang. The limit only ends what would never end: a slow machine, a sanitizer
#: or a pause of the whole system is no defect.
PATIENCE = 600


def run_child(code, *, timeout=PATIENCE, env=None, check=True):
    """Runs Python code in a fresh interpreter that sees the same packages and these helpers; returns what it says.

    `env` adds variables; None removes one. Nothing of the parent's thread or CPU settings is inherited.
    """
    removed = {"MHA_C_NUM_THREADS", "OMP_NUM_THREADS", "MHA_C_CPU"}
    variables = {k: v for k, v in os.environ.items() if k not in removed}
    variables.update({k: v for k, v in (env or {}).items() if v is not None})
    path = [str(Path(__file__).parent), *(p for p in sys.path if p and Path(p) != REPOSITORY)]
    variables["PYTHONPATH"] = os.pathsep.join(path)
    # "python -c" imports from the folder it runs in, so that must not be the repository with its mha_c/.
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True,
                          timeout=timeout, env=variables, cwd=Path(__file__).parent, check=False)
    if check:
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def memory_in_use(kind):
    """Bytes of physical memory that count as Rss, LazyFree, ...: page by page, since statm may lag behind by megabytes."""
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(f"{kind}:")) * 1024


def most_memory():
    """The most physical memory that this process ever used, in bytes."""
    import resource
    if sys.platform.startswith("linux"):  # where ru_maxrss begins with what the parent had
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------------- signals

# A call looks for signals after 50 ms and every 50 ms. Processor time tells how long it is, since the system may stop a
# process at any moment, and is compared with that of the same call, since machines differ.


def lasting_inputs(module, seconds=0.5):
    """One item of a batch for which a call without weights keeps each thread busy at least so long on this machine."""
    import mha_c
    length = 2000
    while True:
        given = inputs(1, length, length, module.embed_dim)
        begun = time.process_time()
        module(*given, need_weights=False)
        taken = (time.process_time() - begun) / mha_c.get_num_threads()
        if taken >= seconds:
            return given
        length = int(length * min(8, max(1.2, (1.3 * seconds / max(taken, 1e-3)) ** 0.5)))  # time grows by its square


def interrupt(call, after):
    """Ctrl-C when a call has taken so much processor time; how much more it takes until the KeyboardInterrupt, or None
    if the call came to its end before the signal."""
    sent, over = [], False
    begun = time.process_time()

    def send():
        while time.process_time() - begun < after:
            time.sleep(0.005)
        sent.append(time.process_time())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send).start()
    try:
        call()
        over = True
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        return None if over else time.process_time() - sent[0]


def assert_interruptible(call):
    """Ctrl-C ends a call early, whenever it comes: if not, it would take nine tenths of the call to notice it."""
    begun = time.process_time()
    call()
    whole = time.process_time() - begun
    assert whole > 0.3, "too short a call to see anything"
    waited = None
    while waited is None:
        waited = interrupt(call, whole / 10)
    assert waited < whole / 2, f"KeyboardInterrupt came {waited:.2f} s after the signal, in a call of {whole:.2f} s"
