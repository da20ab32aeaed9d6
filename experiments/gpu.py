"""The 7B on one GPU: sixteen rows, each measured through the project's own code and printed at once.

    python experiments/gpu.py                every row, 8 minutes on an H100 at most
    python experiments/gpu.py --rows 2 5     row 1, which builds the policy, and these
    python experiments/gpu.py --tiny         every row with a small policy, on a CPU, in a minute
    python experiments/gpu.py --rehearsal    the 7B on a CPU, in 20 GB of free memory: build it, act once,
                                             score that chunk with gradient

It needs torch, transformers, peft and pillow, no file and no network. Weights and pictures are random; rows
2, 3, 13 and 14 say more noise than trained weights have. Rows 7 and 15 also need the wheels of mujoco==3.3.2
and pyopengl, and Debian's libegl1 and libopengl0. They draw a scene of their own, or with --scene FILE one of
LIBERO's, 49 MB, which --save_scene FILE writes where LIBERO is: an .npz of MuJoCo's binary model and the
joints' positions. A row that fails says so in a line, and the next one runs.
"""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import copy
import gc
import importlib.util
import os
import re
import resource
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import torch
from torch import distributed

import ript
from experiments.common import ask
from policies.checkpoints import fill
from policies.openvla_oft import OpenVLAOFT, is_adapter_or_head
from simulators import environment

# The sizes of openvla-7b-oft-finetuned-libero-10, and the bounds of its actions.
FULL = dict(vocab_size=32064, pad_token_id=32000, hidden_size=4096, intermediate_size=11008,
            num_hidden_layers=32, num_attention_heads=32)
ACTION = dict(q01=[-0.63482, -0.77411, -0.76339, -0.0975, -0.1482, -0.27429, 0],
              q99=[0.77143, 0.84643, 0.9375, 0.13929, 0.15964, 0.32464, 1])
STATISTICS = dict(action=ACTION, proprio=dict(q01=[-1] * 8, q99=[1] * 8))
PIXELS = (dict(mean=[0.5] * 3, std=[0.5] * 3),) * 2
TINY = dict(vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
TINY_TOWERS = (dict(embed_dim=32, depth=2, num_heads=4, prefix=5, layer_scale=True),
               dict(embed_dim=48, depth=2, num_heads=4, mlp_ratio=3.7362, pool=True))
# A byte is a token here, and the prompt is nothing but these: as many tokens as Llama makes of LIBERO-Long's.
TEXTS = ("put both pots on the stove", "close the lowest drawer of the cabinet")
NO_MUJOCO = "not measured: mujoco is absent, carry its wheel and pyopengl's"
GIB = 2 ** 30

def say(text):
    """Print a line now, so that a run that is cut keeps it."""
    print(f"   {text}", flush=True)

@torch.no_grad()
def build_policy(tiny, device):
    """OpenVLA-OFT as a run has it, with random weights: bfloat16, and adapters and heads in float32."""
    from transformers import ByT5Tokenizer
    llm, towers = (TINY, TINY_TOWERS) if tiny else (FULL, OpenVLAOFT.TOWERS)
    with torch.device("meta"):  # shapes without memory
        policy = OpenVLAOFT(llm, towers, PIXELS, STATISTICS, ByT5Tokenizer())
    policy.PROMPT = "{}"
    policy.to(torch.bfloat16)
    policy.action_head.float()
    policy.scale_head.float()
    policy.drop_unused()
    policy.add_lora()
    policy.to_empty(device=device)
    torch.manual_seed(0)
    for name, p in policy.named_parameters():
        # Outputs are as large as inputs, and what adapters add is a twentieth of it.
        if p.dim() > 1:
            p.normal_(0, (0.1 if "lora_B" in name else 1) * p[0].numel() ** -0.5)
        else:
            p.fill_(0 if name.endswith("bias") else 1)
    llama = policy.language_model.model
    llama.rotary_emb = type(llama.rotary_emb)(llama.config).to(device)  # it is no parameter
    policy.check_attention()
    policy.train_only(policy.trained)
    return policy

def episode(chunks, success=False):
    """Records as an episode whose action steps all ran."""
    context = ript.Context(0, chunks[0]["instruction"], 0)
    return ript.Episode(context, chunks=chunks, num_executed=[8] * len(chunks), success=success)

def score(policy, chunks, micro_batch):
    """ript.compute_old_log_probs of chunks, so many at once."""
    episodes = [episode(chunks)]
    return ript.compute_old_log_probs(policy, episodes, ript.make_micro_batches(episodes, [0], micro_batch))

def describe(log_ratio):
    """What PPO would take for a change of the policy."""
    beyond = ((log_ratio.exp() - 1).abs() > 0.1).float().mean()
    largest = log_ratio.abs().max()
    return f"log-ratio std {log_ratio.std():.4f}, largest {largest:.4f}, outside the clip {beyond:.1%}"

class Bench:
    """What the rows share."""
    def __init__(self, options):
        self.options = options
        self.tiny = options.tiny
        self.device = options.device
        self.cuda = self.device != "cpu"
        self.chunks = 4 if self.tiny else 16  # of each comparison
        self.micro = (1, 4) if self.tiny else (1, 4, 16)
        self.batch = 4 if self.tiny else 8  # observations per forward, as runs have it
        self.seconds = 0.1 if self.tiny else 3.0  # of each measurement of speed
        rng = np.random.default_rng(0)
        pictures = rng.integers(0, 256, (32, 2, 224, 224, 3), dtype=np.uint8)
        self.observations = [dict(pictures=p, proprio=rng.uniform(-1, 1, 8)) for p in pictures]

    def build(self):
        """Make the policy, with b = 0.135."""
        self.policy = build_policy(self.tiny, self.device)
        self.policy.scale_range = ((0.135,) * 7,) * 2  # whatever the scale head says

    def act(self, number, batch):
        """Explore from so many observations: -> their chunks."""
        chunks = []
        for start in range(0, number, batch):
            which = range(start, min(start + batch, number))
            texts = [TEXTS[i % 2] for i in which]
            generators = [np.random.default_rng(i) for i in which]
            chunks += self.policy.act([self.observations[i] for i in which], texts, generators)
        return chunks

    def halves(self):
        """Records as two episodes, of which one succeeds."""
        chunks = self.act(self.chunks, 8)
        middle = self.chunks // 2
        return [episode(chunks[:middle], True), episode(chunks[middle:])]

    def optimizer(self):
        """AdamW as in ript.main, with steps so small that random weights stay what they are."""
        lr = 2e-5 if self.tiny else 2e-7
        return torch.optim.AdamW(self.policy.parameter_groups(), lr, (0.9, 0.999), fused=self.cuda)

    def update(self, optimizer, episodes, rollouts, micro_batch):
        """One step of ript.update, on all episodes."""
        cfg = ript.Config(rollouts=rollouts, minibatch=len(episodes), micro_batch=micro_batch, ppo_epochs=1)
        return ript.update(self.policy, optimizer, episodes, cfg, ript.TrainState())

    def reset_peak(self):
        """Free what is free, and measure peaks from here on."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self):
        """The peak memory since then; on a CPU the process's since it began."""
        if not self.cuda:
            kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return f"peak {kilobytes / 2 ** 20:.2f} GiB of the process"
        allocated = torch.cuda.max_memory_allocated() / GIB
        reserved = torch.cuda.max_memory_reserved() / GIB
        return f"peak {allocated:.2f} GiB, reserved {reserved:.2f} GiB"

    def clock(self, call):
        """Seconds of a call."""
        began = time.perf_counter()
        call()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def rate(self, call, chunks):
        """Chunks per second of a call that handles so many."""
        call()
        times = [self.clock(call)]
        while sum(times) < self.seconds:
            times.append(self.clock(call))
        return f"{chunks * len(times) / sum(times):.2f} chunks/s"

# -------------------------------------------------------------------------------------------------- The rows
def build(bench):
    """build: dtypes, devices and bytes"""
    say(f"built in {bench.clock(bench.build):.1f} s, {bench.peak()}")
    sizes = {}
    for name, p in bench.policy.named_parameters():
        kind = f"{'adapters' if 'lora_' in name else name.split('.')[0]}: {p.dtype} on {p.device}"
        sizes[kind] = sizes.get(kind, 0) + p.numel() * p.element_size() / GIB
    for kind, size in sizes.items():
        say(f"{kind}, {size:.3f} GiB")
    if bench.cuda:
        free, card = torch.cuda.mem_get_info()
        context = (card - free - torch.cuda.memory_reserved()) / GIB
        say(f"the card has {card / GIB:.2f} GiB, of which CUDA's context and others take {context:.2f}")

def agreement(bench):
    """act against log_prob: one function, two sizes of batch"""
    policy = bench.policy
    finite = []
    hook = policy.language_model.model.register_forward_hook(
        lambda module, arguments, output: finite.append(output.last_hidden_state.isfinite().all().item()))
    try:
        for policy.prefix in ("prompt", "exact"):
            # The least of the released bounds; what a head may say; ours.
            for b in (0.135,) if bench.tiny else (0.677, 0.05, 0.135):
                policy.scale_range = ((b,) * 7,) * 2
                for batch in (1, 8):
                    chunks = bench.act(bench.chunks, batch)
                    for micro in bench.micro if b == 0.135 else (4,):
                        _, old, recorded = score(policy, chunks, micro)
                        say(f"{policy.prefix}, b {b}, act_batch {batch}, micro_batch {micro}: "
                            f"{describe(old - recorded)}")
        with torch.no_grad():
            whole = policy.log_prob(chunks[:4])
        cached = policy.log_prob(chunks[:4]).detach()
        say(f"cached against whole, both exact and in fours: {describe(cached - whole)}")
        say(f"forwards without NaN or infinity in any row, padding included: {sum(finite)} of {len(finite)}")
    finally:
        hook.remove()
        policy.prefix = "exact"
        policy.scale_range = ((0.135,) * 7,) * 2

def yardstick(bench):
    """the same against a float32 copy"""
    precise = copy.deepcopy(bench.policy).float()
    chunks = {batch: bench.act(bench.chunks, batch) for batch in (1, 8)}
    with torch.no_grad():
        means = [policy.density(bench.observations[:4], TEXTS * 2)[0] for policy in (bench.policy, precise)]
    error = (means[0] - means[1]).abs()
    say(f"bfloat16's error in the mean: {error.mean():.4f}, largest {error.max():.4f}")
    for batch, acted in chunks.items():
        _, truth, recorded = score(precise, acted, 4)
        say(f"act_batch {batch}: {describe(recorded - truth)}")
    for micro in bench.micro:
        _, old, _ = score(bench.policy, acted, micro)
        say(f"micro_batch {micro}: {describe(old - truth)}")

def memory(bench):
    """peak memory of score, backward, clip and AdamW"""
    optimizer = bench.optimizer()
    episodes = bench.halves()
    limits = (None, 24, 22.5) if bench.cuda else (None,)  # GiB of torch's pool; the context comes on top
    try:
        for limit in limits:
            if limit:
                card = torch.cuda.mem_get_info()[1] / GIB
                torch.cuda.set_per_process_memory_fraction(min(1.0, limit / card))
            for micro in (1, 4) if bench.tiny else (1, 2, 4, 8, 16):
                bench.reset_peak()
                try:
                    seconds = bench.clock(lambda: bench.update(optimizer, episodes, 2, micro))
                    fits = f"{seconds:.1f} s for {bench.chunks} chunks"
                except torch.cuda.OutOfMemoryError:
                    fits = "does not fit"
                    optimizer.zero_grad()
                say(f"limit {limit}, micro_batch {micro}: {fits}, {bench.peak()}")
    finally:
        if bench.cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)

def acting(bench):
    """chunks per second of act"""
    from peft.tuners.tuners_utils import BaseTunerLayer
    layers = [module for module in bench.policy.modules() if isinstance(module, BaseTunerLayer)]
    for adapters in (False, True):
        for layer in layers:
            layer.enable_adapters(adapters)
        for batch in (1, 4) if bench.tiny else (1, 4, 8, 16, 32):
            rate = bench.rate(lambda: bench.act(batch, batch), batch)
            say(f"act_batch {batch}{'' if adapters else ', without adapters'}: {rate}")
    bench.policy.train_only(bench.policy.trained)  # enable_adapters has changed that
    # Would adapters and heads, which are in float32, be precise enough and faster in the GPU's TF32?
    exact = bench.act(4, 4)
    torch.set_float32_matmul_precision("high")
    try:
        apart = max(np.abs(a["actions"] - c["actions"]).max() for a, c in zip(exact, bench.act(4, 4)))
        for batch in (4,) if bench.tiny else (1, 8):
            rate = bench.rate(lambda: bench.act(batch, batch), batch)
            say(f"act_batch {batch}, float32 as TF32: {rate}, actions differ by {apart:.3g}")
    finally:
        torch.set_float32_matmul_precision("highest")

def scoring(bench):
    """chunks per second of log_prob and backward"""
    chunks = bench.act(bench.chunks, 8)
    for micro in bench.micro:
        rate = bench.rate(lambda: bench.policy.log_prob(chunks[:micro]).sum().backward(), micro)
        say(f"micro_batch {micro}: {rate}")
    bench.policy.zero_grad()

class Scene(ript.Robosuite):
    """MuJoCo without robosuite, in a process of its own: a scene from a file, or blocks on a table."""
    BLOCK = '<body pos="{} {} .1"><freejoint/><geom type="box" size=".02 .02 .02" material="m"/></body>'
    XML = ('<mujoco><asset><texture name="t" type="2d" builtin="checker" rgb1="1 0 0" width="512" '
           'height="512"/><material name="m" texture="t"/></asset><worldbody><light pos="0 0 2"/>'
           '<geom type="plane" size="1 1 1" material="m"/><camera name="agentview" pos="0 0 1"/>'
           '<camera name="robot0_eye_in_hand" pos="0 0 .5"/>{}</worldbody></mujoco>')

    def make_env(self, file):
        """Make the scene, from a file if there is one: -> who draws it."""
        import mujoco
        from OpenGL import GL
        blocks = "".join(self.BLOCK.format(x / 10, y / 10) for x in range(-3, 4) for y in range(-3, 4))
        self.model, qpos = mujoco.MjModel.from_xml_string(self.XML.format(blocks)), None
        if file:
            self.model, qpos = read_scene(file)
        self.data = mujoco.MjData(self.model)
        if file:
            self.data.qpos[:] = qpos
        self.renderer = mujoco.Renderer(self.model, self.image_size, self.image_size)
        return GL.glGetString(GL.GL_RENDERER).decode()

    def run(self, seconds, substeps, every):
        """Control steps of substeps physics steps, with pictures at every so many: -> steps per second."""
        import mujoco
        steps = 0
        began = time.perf_counter()
        while time.perf_counter() - began < seconds or steps % every:
            mujoco.mj_step(self.model, self.data, nstep=substeps)
            steps += 1
            for camera in self.CAMERAS if steps % every == 0 else ():
                self.renderer.update_scene(self.data, camera=camera)
                self.renderer.render()
        return steps / (time.perf_counter() - began)

def write_scene(file, model, qpos):
    """Write a scene: MuJoCo's own binary form of a model as bytes, and its joints' positions, in an .npz."""
    import mujoco
    binary = np.empty(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, binary)
    with ript.writing(Path(file)) as path, open(path, "wb") as out:
        np.savez_compressed(out, model=binary, qpos=qpos)

def read_scene(file):
    """-> the model and the joints' positions that write_scene has written. Nothing is unpickled."""
    import mujoco
    with ript.reading(file), np.load(file, allow_pickle=False) as arrays:
        binary = {"scene.mjb": arrays["model"].tobytes()}
        return mujoco.MjModel.from_binary_path("scene.mjb", binary), arrays["qpos"]

@contextmanager
def drawing(bench, number):
    """So many processes, each of which has made the scene."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("LP_NUM_THREADS", "0")
    free = torch.cuda.mem_get_info()[0] if bench.cuda else 0
    simulators = [ript.Simulator(ript.Config(suite=f"{__file__}:Scene")) for _ in range(number)]
    try:
        renderers = set(ask(simulators, "make_env", [(bench.options.scene,)] * number))
        say(f"{bench.options.scene or 'a scene of our own'}, drawn by {', '.join(renderers)}")
        if bench.cuda:
            taken = (free - torch.cuda.mem_get_info()[0]) / GIB
            say(f"{number} processes take {taken:.2f} GiB of the card")
        yield simulators
    finally:
        for simulator in simulators:
            simulator.close()

def pictures(bench):
    """EGL: pictures of 256x256 pixels"""
    say(f"EGL has {environment.egl_devices()} devices")
    if importlib.util.find_spec("mujoco") is None:
        return say(NO_MUJOCO)
    numbers = (1, 2) if bench.tiny else (1, 8, 16)
    with drawing(bench, numbers[-1]) as simulators:
        for number in numbers:
            speed = []
            for substeps, every in ((0, 1), (25, 1), (25, 8)):
                words = bench.seconds, substeps, every
                speed.append(sum(ask(simulators[:number], "run", [words] * number)))
            say(f"{number} processes: {2 * speed[0]:.0f} pictures/s; control steps/s with two at each "
                f"{speed[1]:.0f}, at every eighth {speed[2]:.0f}, ratio {speed[2] / speed[1]:.2f}")

def collectives(bench):
    """NCCL with one rank: the project's collectives"""
    os.environ.update(ript.LAUNCH | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="0"))
    ript.WORLD = 2  # alone, ript calls no collective; with a 2 here it does, in a group of one
    try:
        ript.init_distributed(bench.device)
        timeout = distributed.distributed_c10d._get_default_store().timeout
        say(f"{distributed.get_backend()}, the store's timeout is {timeout}")
        parameters = bench.policy.parameter_groups()[0]["params"]
        for turn in ("first", "second"):
            bench.reset_peak()
            say(f"{turn} gather: {bench.clock(lambda: ript.all_gather(1)):.3f} s")
            say(f"{turn} reduce_gradients: {bench.clock(lambda: ript.reduce_gradients(parameters)):.3f} s, "
                f"{bench.peak()}")
    finally:
        ript.WORLD = 1
        bench.policy.zero_grad()
        if distributed.is_initialized():
            distributed.destroy_process_group()

def repetition(bench):
    """two equal updates: equal checksums?"""
    episodes = bench.halves()
    trained = bench.policy.parameter_groups()[0]["params"]
    start = [p.detach().clone() for p in trained]
    sums = []
    for _ in range(2):
        for p, value in zip(trained, start):
            p.data.copy_(value)
        bench.update(bench.optimizer(), episodes, 2, 4)
        sums.append(sum(p.detach().view(torch.int32).sum(dtype=torch.int64).item() for p in trained))
    say(f"checksums {sums[0]} and {sums[1]}: {'equal' if sums[0] == sums[1] else 'NOT equal'}")

def bandit(bench):
    """five updates: the rewarded sign of one action dimension becomes likelier"""
    policy = bench.policy
    optimizer = bench.optimizer()
    seen = bench.observations[:1] * 8
    texts = TEXTS[:1] * 8
    means = []
    for turn in range(7):
        with torch.no_grad():
            means.append(policy.density(seen[:1], texts[:1])[0][0, 0, 0].item())
        moved = (means[-1] - means[0]) / 0.135
        say(f"after {turn} updates the mean has moved by {moved:+.2f} b towards the reward")
        if turn == 5:
            ript.require(moved > 0, "the rewarded sign has not become likelier")
            optimizer.param_groups[0]["lr"] = ript.Config.lr
            say(f"one more, at the learning rate of runs, {ript.Config.lr}")
        if turn < 6:
            episodes = []
            for group in range(2):
                generators = [np.random.default_rng((turn, group, k)) for k in range(8)]
                for chunk in policy.act(seen, texts, generators):
                    episodes.append(episode([chunk], bool(chunk["sample"][0, 0] > means[0])))
            stats = bench.update(optimizer, episodes, 8, bench.micro[-1])
            say("  ".join(f"{name} {value:.3g}" for name, value in stats.items()))

def adapters(bench):
    """adapters saved, and loaded onto the device: the same actions?"""
    policy = bench.policy
    before = bench.act(4, 4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = bench.clock(lambda: policy.save(folder))
        say(f"saved {sum(f.stat().st_size for f in folder.iterdir()) / GIB:.2f} GiB in {seconds:.1f} s")
        for parameter, p in policy.named_parameters():
            if is_adapter_or_head(parameter):
                p.data.zero_()
        without = bench.act(4, 4)
        seconds = bench.clock(lambda: policy.read_adapter(folder / "adapter_model.safetensors"))
        seconds += bench.clock(lambda: fill(folder / "openvla_headers.pt", **policy.heads()))
    after = bench.act(4, 4)
    for name, others in (("without", without), (f"loaded in {seconds:.1f} s", after)):
        apart = max(np.abs(a["actions"] - c["actions"]).max() for a, c in zip(before, others))
        say(f"{name}: actions differ by {apart:.3g}")

@contextmanager
def float32_adapters(policy):
    """Adapters as they were: PEFT casts their inputs to float32, and the decoder runs without autocast."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    layers = [layer for layer in policy.language_model.modules() if isinstance(layer, BaseTunerLayer)]

    def decode(x, **inputs):
        return policy.language_model.model(inputs_embeds=x, **inputs).last_hidden_state

    for layer in layers:
        layer.cast_input_dtype_enabled = True
    policy.decode = decode
    try:
        yield
    finally:
        del policy.decode
        for layer in layers:
            layer.cast_input_dtype_enabled = False

def speed_of(bench, texts):
    """Acting and gradients in chunks per second, and their peak memory, for equal or mixed instructions."""
    policy, micro = bench.policy, bench.micro[-1]
    observations, texts = bench.observations[:16], (texts * 16)[:16]

    def act(size):
        generators = [np.random.default_rng(i) for i in range(size)]
        return policy.act(observations[:size], texts[:size], generators)

    bench.reset_peak()
    acting, acting_peak = bench.rate(lambda: act(bench.batch), bench.batch), bench.peak()
    chunks = act(micro)
    bench.reset_peak()
    scoring = bench.rate(lambda: policy.log_prob(chunks).sum().backward(), micro)
    policy.zero_grad()
    return (f"act_batch {bench.batch}: {acting}, {acting_peak}; "
            f"gradient, micro_batch {micro}: {scoring}, {bench.peak()}")

def precision(bench):
    """adapters in float32, as they were, against adapters in the decoder's precision, as they are"""
    now = bench.act(bench.batch, bench.batch)
    with float32_adapters(bench.policy):
        before = bench.act(bench.batch, bench.batch)
        say(f"float32: {speed_of(bench, TEXTS)}")
    say(f"the decoder's: {speed_of(bench, TEXTS)}")
    apart = np.stack([a["sample"] - c["sample"] for a, c in zip(before, now)])
    say(f"normalised actions differ by {np.abs(apart).mean():.4f}, at most {np.abs(apart).max():.4f}")

def steps(bench):
    """an optimiser step: what it changes, and how much of that is rounding"""
    policy = bench.policy
    episodes = bench.halves()
    chunks = [chunk for half in episodes for chunk in half.chunks]
    trained = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
    precise = copy.deepcopy(policy).float()
    old = [score(p, chunks, 4)[1] for p in (policy, precise)]
    for lr in (2e-7, ript.Config.lr):
        optimizer = bench.optimizer()
        for group in optimizer.param_groups:
            group["lr"] = lr
        bench.update(optimizer, episodes, 2, 4)
        moved = dict(policy.named_parameters())
        precise.load_state_dict({name: moved[name] for name in trained}, strict=False)
        change, truth = (score(p, chunks, 4)[1] - was for p, was in zip((policy, precise), old))
        say(f"lr {lr}, as computed: {describe(change)}")
        say(f"lr {lr}, in float32: {describe(truth)}")
        say(f"lr {lr}, rounding alone: {describe(change - truth)}")
        policy.load_state_dict(trained, strict=False)

@contextmanager
def largest_outputs(policy):
    """-> a dict that fills with the largest absolute output of each kind of module, NaN if there is one.

    A kind is a name without the numbers of layers and blocks."""
    largest, hooks = {}, []
    for name, module in policy.named_modules():
        if isinstance(module, torch.nn.Identity):
            continue

        def keep(module, arguments, output, kind=re.sub(r"\b\d+\b", "*", name)):
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                value = output.detach().abs().max().float()
                largest[kind] = torch.maximum(largest.get(kind, value), value)  # which keeps a NaN

        hooks.append(module.register_forward_hook(keep))
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()

@torch.no_grad()
def half(bench):
    """a float16 base: noise against float32, and what overflows; no option, a measurement"""
    chunks = bench.act(bench.chunks, 8)
    halved = copy.deepcopy(bench.policy)
    for name, p in halved.named_parameters():
        if not is_adapter_or_head(name):
            p.data = p.data.half()
    precise = copy.deepcopy(bench.policy).float()
    found, truth = {}, None
    for name, policy in (("float32", precise), ("bfloat16", bench.policy), ("float16", halved)):
        with largest_outputs(policy) as largest:
            parts = [policy.log_prob(chunks[start:start + 4]) for start in range(0, len(chunks), 4)]
        found[name] = torch.cat(parts).cpu()
        truth = found["float32"]
        say(f"{name}: {describe(found[name] - truth)}")
        sizes = {kind: value.item() for kind, value in largest.items()}
        broken = [kind for kind, size in sizes.items() if not np.isfinite(size)]
        finite = sorted((size, kind) for kind, size in sizes.items() if np.isfinite(size))
        say(f"{name}: infinity or NaN in {len(broken)} of {len(sizes)} kinds of modules {broken[:5]}, "
            f"largest output {finite[-1][0]:.1f} in {finite[-1][1]}")

def both(bench):
    """pictures while the policy acts: the rates alone, and beside each other"""
    if importlib.util.find_spec("mujoco") is None:
        return say(NO_MUJOCO)
    number = 2 if bench.tiny else 16
    acting = bench.rate(lambda: bench.act(bench.batch, bench.batch), bench.batch)
    with drawing(bench, number) as simulators, ThreadPoolExecutor(1) as pool:
        for kind, per_step, substeps, every in (("pictures", 2, 0, 1),
                                                ("control steps with pictures at every eighth", 1, 25, 8)):
            words = [(bench.seconds, substeps, every)] * number
            alone = per_step * sum(ask(simulators, "run", words))
            drawn = pool.submit(ask, simulators, "run", words)
            chunks, began = 0, time.perf_counter()
            while not drawn.done():
                bench.act(bench.batch, bench.batch)
                chunks += bench.batch
            beside = chunks / (time.perf_counter() - began)
            together = per_step * sum(drawn.result())
            say(f"{number} processes, {kind} per second: {alone:.0f} alone, {together:.0f} beside acting")
            say(f"acting: {acting} alone, {beside:.2f} chunks/s beside them")

@contextmanager
def no_mask(policy, causal=False):
    """Attention without a mask, as flash attention wants it: both ways, or with causal one way."""
    from transformers.models.llama import modeling_llama
    attention = [layer.self_attn for layer in policy.language_model.model.layers]
    make_mask = modeling_llama.create_causal_mask
    modeling_llama.create_causal_mask = lambda *arguments, **named: None
    for module in attention:
        module.is_causal = causal
    try:
        yield
    finally:
        modeling_llama.create_causal_mask = make_mask
        for module in attention:
            module.is_causal = True

def flash_runs(bench):
    """Whether the policy acts where no attention but flash attention is allowed."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            bench.act(1, 1)
        return True
    except RuntimeError:  # no available kernel
        return False

def mask(bench):
    """the attention mask where a batch has no padding: what dropping it would give"""
    texts = TEXTS[:1]
    precise = copy.deepcopy(bench.policy).float()
    means = []
    for way in (nullcontext(), no_mask(precise), no_mask(precise, causal=True)):
        with way, torch.no_grad():
            means.append(precise.density(bench.observations[:2], texts * 2)[0])
    del precise
    same, other = ((mean - means[0]).abs().max().item() for mean in means[1:])
    say(f"in float32 the mean differs by {same:.2g} without the mask; it would by {other:.2g} if causal")
    ript.require(same < 1e-3 < other, "attention without the mask is another function")
    for name, way in (("with the mask", nullcontext()), ("without", no_mask(bench.policy))):
        with way:
            say(f"{name}: {'flash attention' if flash_runs(bench) else 'no flash attention'}, "
                f"{speed_of(bench, texts)}")

def rehearse(bench):
    """one chunk, acted and scored with gradient, on a CPU"""
    began = time.perf_counter()
    chunks = bench.act(1, 1)
    say(f"act: {time.perf_counter() - began:.1f} s, {bench.peak()}")
    began = time.perf_counter()
    log_prob = bench.policy.log_prob(chunks)
    say(f"log_prob: {time.perf_counter() - began:.1f} s, {bench.peak()}")
    say(describe(log_prob.detach() - torch.as_tensor(chunks[0]["log_prob"])))
    say(f"backward: {bench.clock(log_prob.sum().backward):.1f} s, {bench.peak()}")
    reached = sum(p.grad is not None for p in bench.policy.parameters())
    say(f"{reached} tensors have gradients")

ROWS = (build, agreement, yardstick, memory, acting, scoring, pictures, collectives, repetition, bandit,
        adapters, precision, steps, half, both, mask)

def save_scene(file):
    """Write MuJoCo's model of LIBERO-Long's first scene, and where things stand."""
    simulator = ript.load_suite("libero_10")()
    simulator.make_env(0)
    sim = simulator.env.sim
    write_scene(file, sim.model._model, sim.data._data.qpos)
    os._exit(0)  # robosuite's destructors would free what is freed already

def run_row(number, row, bench):
    """Measure a row: -> whether it worked. Its failure is one line."""
    print(f"{number}. {row.__doc__}", flush=True)
    began = time.perf_counter()
    failure = ""
    try:
        row(bench)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        shown = " ... ".join(dict.fromkeys((lines[0][:200], lines[-1][:200])))
        failure = f"FAILED with {type(error).__name__}: {shown}, after "
    bench.reset_peak()
    say(f"{failure}{time.perf_counter() - began:.1f} s")
    return not failure

def main(argv=None):
    """Run the rows. The exit status is 1 where one has failed."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.error = partial(ript.require, False)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rehearsal", action="store_true")
    numbers = range(1, len(ROWS) + 1)
    parser.add_argument("--rows", type=int, nargs="+", default=numbers, choices=numbers)
    parser.add_argument("--scene", default="")
    parser.add_argument("--save_scene", default="")
    options = parser.parse_args(argv)
    if options.save_scene:
        save_scene(options.save_scene)
    on_cpu = options.tiny or options.rehearsal or not torch.cuda.is_available()
    options.device = "cpu" if on_cpu else "cuda"
    rows = {number: row for number, row in enumerate(ROWS, 1) if number in (1, *options.rows)}
    if options.rehearsal:
        rows = {1: build, 2: rehearse}
        memory = Path("/proc/meminfo").read_text().split()
        free = int(memory[memory.index("MemAvailable:") + 1]) / 2 ** 20
        enough = free >= 20 or options.tiny
        ript.require(enough, f"the rehearsal needs 20 GiB of free memory, {free:.1f} are free")
    else:
        ript.require(options.device == "cuda" or options.tiny,
                     "there is no GPU; --tiny measures a small policy, --rehearsal is the 7B on a CPU")
    print(f"{torch.cuda.get_device_name() if options.device == 'cuda' else 'CPU'}, torch {torch.__version__}")
    if options.tiny:
        torch.set_num_threads(1)  # so little work is forty times slower in two threads, where others run too
    bench = Bench(options)
    worked = [run_row(number, row, bench) for number, row in rows.items()]
    sys.exit(0 if all(worked) else 1)

if __name__ == "__main__":
    ript.run_command(main)
