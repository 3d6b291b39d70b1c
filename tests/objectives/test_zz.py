import importlib.util, torch, torch.distributed as dist
from pathlib import Path
spec=importlib.util.spec_from_file_location("obj", "/work/main/tests/objectives/test_objectives.py"); T=importlib.util.module_from_spec(spec); spec.loader.exec_module(T)
from torch.nn.parallel import DistributedDataParallel as DDP
def go(wrapname):
    dist.init_process_group("gloo")
    r,w=dist.get_rank(),dist.get_world_size()
    out=[]
    for rep in range(2):
        m=T.toy("infonce",{})
        f=DDP(m) if wrapname=="ddp" else m
        l=f(T.part(T.batch(),r,w),T.part(T.scenarios()["everyone"],r,w)); l.total.backward()
        g=T.gradients(m)
        if wrapname!="ddp":
            for v in g.values(): dist.all_reduce(v); v/=w
        out.append((l.total.item(),g))
    return out
def test_x(ranks):
    m=T.toy("infonce",{}); l=m(T.batch(),T.scenarios()["everyone"]); l.total.backward(); g=T.gradients(m)
    for wn in ("manual","ddp"):
        for a in ranks(2,go,wn):
            for t,h in a: print(wn,t,l.total.item(),{k:(h[k]-g[k]).abs().max().item() for k in g})
    assert 0
