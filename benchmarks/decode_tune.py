"""Dev: variants of a small step."""
import argparse, functools, json, multiprocessing, os, statistics, sys, time
from pathlib import Path
import torch
from torch.nn.functional import linear
from benchmarks.graph_timing import copy_bytes_per_us, read_bytes_per_us, time_us
OUT = Path(os.environ.get("OUT", "/tmp"))
ROWS = []
T0 = time.time()
def note(**row):
    ROWS.append(row); (OUT / "tune.json").write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": ROWS}))
def say(*a): print(f"[{time.time()-T0:.0f}]", *a, flush=True)
def draw(*size, scale=1.0): return torch.empty(size, device="cuda", dtype=torch.bfloat16).normal_(std=scale)

GATED_LINES = [(4,1024,4,1),(4,2048,4,1),(2,2048,4,1),(2,1024,4,2),(2,2048,4,2),(4,1024,4,2),(4,512,4,2)]
PLAIN_LINES = [(8,256,4,1),(4,1024,4,1),(8,256,2,1),(4,256,4,2),(8,256,4,2),(4,1024,4,2)]

def linear_candidates(tokens, rows):
    from kernels.skinny_linear.tiled import Walk
    found = ["cublas"]
    if tokens <= 8: found.append("fma")
    router = rows <= 256
    if tokens <= 16 or router:
        for n in ((8, 16) if tokens <= 8 else (16,)):
            for r in (16, 32):
                for parts in (8, 16):
                    found.append(("whole", n, r, parts))
    if tokens <= 16: walks = [(16,32,128,4,5),(16,32,256,4,4),(16,16,256,2,4),(16,16,128,2,6),(16,64,128,4,4)]
    elif tokens <= 32: walks = [(32,32,128,4,5),(32,32,256,4,3),(32,64,128,4,4),(16,16,256,2,4),(32,16,256,2,4)]
    elif tokens <= 64: walks = [(64,32,128,4,4),(64,64,128,4,4),(64,64,64,4,6),(16,16,256,2,4)]
    elif tokens <= 128: walks = [(128,64,64,4,4),(128,64,64,8,4),(128,32,64,4,5),(64,64,64,4,6),(128,64,128,8,3)]
    else: walks = [(128,64,64,4,4),(128,128,64,8,4),(128,64,64,8,4),(256,64,64,8,4),(256,32,64,8,4)]
    if router: walks = walks[:3] + [(16,16,256,2,4),(16,16,256,4,4)]
    found += [("walk", *w, p) for w in walks for p in ((True, False) if tokens in (8, 32, 128) and not router else (True,))]
    return list(dict.fromkeys(found))

def run_linear(kind, x, w):
    from kernels.skinny_linear.kernel import skinny_linear_triton
    from kernels.skinny_linear.tiled import Walk, walking_linear_triton, whole_linear_triton
    if kind == "cublas": return linear(x, w)
    if kind == "fma": return skinny_linear_triton(x, w)
    if kind[0] == "whole": return whole_linear_triton(x, w, None, *kind[1:])
    return walking_linear_triton(x, w, None, Walk(*kind[1:]))

LINEARS = {"qkv": (5120, 2048), "out": (2048, 4096), "router": (128, 2048)}
LINEAR_TOKENS = (1, 8, 16, 32, 64, 128, 256)

def work_list():
    work = [("pair", op, t, l) for op in ("gate_up", "down") for t in (1, 2) for l in (GATED_LINES if op == "gate_up" else PLAIN_LINES)]
    return work

def compile_some(work):
    os.environ["TRITON_PRINT_AUTOTUNING"] = "0"
    bad = []
    from kernels.permute import Permutation
    for w in work:
        try:
            if w[0] == "linear":
                n, d = LINEARS[w[1]]
                run_linear(w[3], torch.zeros(w[2], d, device="cuda", dtype=torch.bfloat16), torch.zeros(n, d, device="cuda", dtype=torch.bfloat16))
            else:
                from kernels.grouped_gemm.pairs import Lines, pair_product
                gated = w[1] == "gate_up"
                d, n = (2048, 768) if gated else (768, 2048)
                p = Permutation(torch.zeros(8 * w[2], device="cuda", dtype=torch.int32), torch.zeros(129, device="cuda", dtype=torch.int32))
                x = torch.zeros(w[2] if gated else 8 * w[2], d, device="cuda", dtype=torch.bfloat16)
                pair_product(x, torch.empty(128, n * (2 if gated else 1), d, device="cuda", dtype=torch.bfloat16), None, p, 8 if gated else 1, "silu" if gated else "none", Lines(*w[3]))
        except Exception as e:
            bad.append((w, repr(e)[:200]))
    torch.cuda.synchronize()
    return bad

def micro():
    ok = set()
    work = work_list()
    unique = {}
    for w in work: unique.setdefault((w[0], w[1], w[3]), w)
    unique = list(unique.values())
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        bad = [b for found in pool.map(compile_some, [unique[i::14] for i in range(14)]) for b in found]
    for w, e in bad: say("BAD", w, e)
    badset = {(w[0], w[1], w[3]) for w, _ in bad}
    say("compiled", len(unique))
    say(f"copy {copy_bytes_per_us()/1e6:.2f} read {read_bytes_per_us()/1e6:.2f} TB/s")
    for name, (n, d) in ():
        ws = [draw(n, d, scale=d**-0.5) for _ in range(10)]
        for t in LINEAR_TOKENS:
            xs = [draw(t, d) for _ in ws]
            ref = xs[0].float() @ ws[0].float().T
            timed = []
            for kind in linear_candidates(t, n):
                if ("linear", name, kind) in badset: continue
                err = float((run_linear(kind, xs[0], ws[0]).float() - ref).norm() / ref.norm())
                us = time_us([functools.partial(run_linear, kind, x, w) for x, w in zip(xs, ws)])
                if err > 5e-3: say("WRONG", name, t, kind, err)
                timed.append((us, kind)); note(kind="linear", op=name, tokens=t, variant=str(kind), us=us, error=err)
            timed.sort(key=lambda p: p[0])
            lib = next(u for u, k in timed if k == "cublas")
            say(name, t, f"cublas {lib:.1f}", " ".join(f"{k}:{u:.1f}" for u, k in timed[:5]))
        del ws
    from kernels.grouped_gemm import down, gate_up, gate_up_reference, down_reference
    from kernels.grouped_gemm import pairs as P
    from kernels.grouped_gemm.kernel import gate_up_triton, down_triton
    from kernels.grouped_gemm.tiles import choose_tiles
    from kernels.permute import permute
    first = [draw(128, 1536, 2048, scale=2048**-0.5) for _ in range(4)]
    second = [draw(128, 2048, 768, scale=768**-0.5) for _ in range(4)]
    for t in (1, 2, 4, 8, 16, 32):
        perms = [permute(torch.stack([torch.randperm(128, device="cuda")[:8] for _ in range(t)]).int(), 128) for _ in range(8)]
        x = draw(t, 2048)
        h = gate_up_reference(x, first[0], perms[0], 8)
        hr = h.float()
        for op, linesets in (("gate_up", GATED_LINES), ("down", PLAIN_LINES)):
            timed = []
            ref = (gate_up_reference(x, first[0], perms[0], 8) if op == "gate_up" else down_reference(h, second[0], perms[0])).float()
            for lines in [None, *linesets]:
                if lines is None:
                    tiles = choose_tiles(8 * t, 128, 768 if op == "gate_up" else 2048, op == "gate_up", 2)
                    f = (lambda i: gate_up_triton(x, first[i % 4], perms[i], 8, tiles=tiles)) if op == "gate_up" else (lambda i: down_triton(h, second[i % 4], perms[i], tiles=tiles))
                else:
                    L = P.Lines(*lines)
                    f = (lambda i: P.pair_product(x, first[i % 4], None, perms[i], 8, "silu", L)) if op == "gate_up" else (lambda i: P.pair_product(h, second[i % 4], None, perms[i], 1, "none", L))
                err = float((f(0).float() - ref).norm() / ref.norm())
                us = time_us([functools.partial(f, i) for i in range(8)])
                if not err < 1e-2: say("WRONG", op, t, lines, err)
                timed.append((us, lines or "tiles")); note(kind="pairs", op=op, tokens=t, variant=str(lines or "tiles"), us=us, error=err)
            timed.sort(key=lambda p: p[0])
            base = next(u for u, k in timed if k == "tiles")
            say(op, t, f"tiles {base:.1f}", " ".join(f"{k}:{u:.1f}" for u, k in timed))

def steps(batches, layers):
    import shutil, tempfile
    import benchmarks.native_decode as nd
    from kernels import launch
    from kernels.grouped_gemm import pairs as P
    from kernels.decode_attention import kernel as attention, splits
    from kernels.skinny_linear import skinny_linear as now
    from runtime.native import forward
    from runtime.step_plan import StepPlan
    from runtime.bench import DecodeBenchmark, start_sequences
    folder = Path(tempfile.mkdtemp()) / "qwen"; folder.mkdir()
    config = json.loads((nd.SHAPES / "qwen3-30b-a3b/config.json").read_text()); config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config))
    nd.SHAPES = folder.parent
    flags = argparse.Namespace(shape="qwen", context=136, steps=128, warmup_steps=8, device="cuda", routes="uniform")
    run, source = nd.start(flags, batches)
    say("weights ready")
    model = run.worker.model
    def old(x, w, b=None): return now(x, w, b) if x.shape[0] <= 4 else linear(x, w, b)
    def make(big, router):
        def f(x, w, b=None):
            if x.shape[0] > 512: return linear(x, w, b)
            if w.shape[0] <= 256: return run_linear(router(x.shape[0]), x, w)
            kind = big(x.shape[0], w.shape[1])
            return old(x, w, b) if kind is None else run_linear(kind, x, w)
        return f
    small = lambda t: ("whole", 8 if t <= 8 else 16, 16, 8)
    router_only = make(lambda t, d: None, small)
    whole = make(lambda t, d: None if t <= 4 or t > 16 else ("whole", 8 if t <= 8 else 16, 16, 16 if d > 2048 and t <= 8 else 8), small)
    def walk_of(t, d):
        if t <= 4: return None
        if t <= 16: return ("walk", 16, 16, 256, 2, 4)
        if t <= 32: return ("walk", 32, 32, 128, 4, 5)
        if t <= 64: return ("walk", 64, 32, 128, 4, 4)
        return ("walk", 128, 64, 64, 4, 4)
    walk = make(walk_of, small)
    choose = splits.choose_tiles
    def least(n):
        import dataclasses
        return lambda *a: dataclasses.replace(choose(*a), least=n)
    from kernels.skinny_linear import kernel as skinny
    from kernels.skinny_linear.kernel import skinny_linear_triton
    fma8 = make(lambda t, d: "fma" if t <= 8 else None, small)
    best = dict(mode=2, lin=router_only, tiles=choose, pairs=64, fuse=True, enough=1024)
    few = (1, 2, 4)
    variants = {
        "late": best | dict(mode=1),
        "early": best,
        "early nofuse": best | dict(fuse=False, only=few),
        "enough512": best | dict(enough=512, only=few),
        "enough2048": best | dict(enough=2048, only=few),
        "fma8": best | dict(lin=fma8, only=(8,)),
        "whole": best | dict(lin=whole, only=(8, 16)),
        "pairs256": best | dict(pairs=256, only=(16, 32)),
        "whole+pairs256": best | dict(lin=whole, pairs=256, only=(16,)),
    }
    table = {}
    for batch in batches:
        base_logits = None
        for name, v in variants.items():
            if batch not in v.get("only", batches): continue
            try:
                launch.MODE, P.MOST_PAIRS, forward.skinny_linear, attention.choose_tiles = v["mode"], v["pairs"], v["lin"], v["tiles"]
                forward.FUSE, skinny.ENOUGH_PROGRAMS = v["fuse"], v["enough"]
                start_sequences(run, DecodeBenchmark((batch,), 136, 128, 8, 0, "uniform"), batch)
                run.worker.replay(source.draw(4, batch))
                for _ in range(2): run.worker.execute(StepPlan())
                logits = model.logits.float().clone()
                graph = next(iter(model._graphs.values()))._graph
                samples = []
                n = 12 if batch <= 8 else 6
                for _ in range(5):
                    a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    a.record()
                    for _ in range(n): graph.replay()
                    b.record(); b.synchronize()
                    samples.append(a.elapsed_time(b) * 1000 / n)
                run.worker.execute(StepPlan(retire=list(range(batch))))
                run.worker.replay(None)
                if base_logits is None: base_logits = logits
                diff = float((logits - base_logits).norm() / base_logits.norm())
                us = statistics.median(samples); table[batch, name] = us
                note(kind="step", batch=batch, layers=layers, variant=name, us=us, least_us=min(samples), difference=diff)
                say(batch, f"{name:24s} {us:9.1f} min {min(samples):9.1f} us  diff {diff:.1e}")
            except Exception as e:
                say("FAILED", batch, name, repr(e)[:400])
                raise
    run.close()

if __name__ == "__main__":
    what = sys.argv[1]
    with torch.no_grad():
        if "micro" in what: micro()
        if "steps" in what: steps([1, 8, 2, 4, 16, 32, 128], 8)
