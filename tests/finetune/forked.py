"""
Run a function in processes of their own, alone or as the ranks of one run, and kill them at will.

Processes are forked, so that none has to import torch again; they meet over gloo on the CPU.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import traceback

import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401  imported once, not in each child
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from small_runs import settings
from transformers import TrainerCallback

from melinoe.data import load_examples
from melinoe.finetune import finetune

LONGEST_S = 600  # a rank that waits for ever says where it stands, and fails its test
KEPT = []  # what must outlive its function, because to destroy it may wait for other threads


class KillAt(TrainerCallback):
    """Ends the process as a lost machine would, before the pass of a step; nothing is tidied up."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(function, *arguments, processes=1, sharded=False):
    """Call *function* in so many processes; how each ended: 0, an exit code, or -signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            code = 1
            faulthandler.dump_traceback_later(LONGEST_S, exit=True)
            try:
                if processes > 1:
                    _join(rank, processes, port, sharded)
                function(*arguments)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _join(rank, processes, port, sharded):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if sharded:
        shard_on_cpu()


def shard_on_cpu():
    """
    Let accelerate use FSDP2 on the CPU, where torch can but accelerate turns to DDP.

    `AcceleratorState.__init__` looks at the FSDP plugin only where the devices are accelerators.
    """
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    }
    plain = AcceleratorState.__init__

    def patched(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = patched


def finetuned(
    place,
    out,
    kill_at=None,
    resume=False,
    callbacks=(),
    ram=None,
    held_out=True,
    **changes,
):
    """`finetune` on the files of the ``checkpoint`` fixture; the log goes to ``<out>.json``."""
    kill = [] if kill_at is None else [KillAt(kill_at)]
    result = finetune(
        place / "base",
        place / "data.jsonl",
        place / out,
        settings(**{"log_every": 2, "eval_every": 3, "save_every": 2} | changes),
        eval_examples=load_examples(place / "data.jsonl") if held_out else None,
        callbacks=[*kill, *callbacks],
        resume=resume,
        ram=ram,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        (place / f"{out}.json").write_text(json.dumps(result.log))
