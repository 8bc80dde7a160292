"""Every operator in nine settings, by every selection algorithm, against the CPU's operators.

Run by itself or, on a GPU, under compute-sanitizer (test_sanitizer.py). Inputs are made and results
compared on the CPU, so that nearly all kernels that a tool has to watch are hata's.
"""

import os
import sys
from typing import Any

import torch
from torch import Tensor

import hata
from cases import INT32_MAX, integer_vectors, row_cache
from decode_cases import DecodeCase, make_decode_case
from devices import DEVICES, algorithms

HALF, BFLOAT = torch.float16, torch.bfloat16
# The setting in which warps of the fused step attend in teams, unless attention is a launch of its
# own.
IN_TEAMS = {"dtype": BFLOAT, "group": 12, "head_dim": 192, "top_k": 200}
SETTINGS: list[tuple[list[int], dict[str, Any]]] = [
    ([90, 1, 0], {"dtype": HALF, "group": 1, "num_bits": 32, "page_size": 1}),
    ([700, 33, 5], {"dtype": BFLOAT, "group": 4, "head_dim": 128, "top_k": 300}),
    ([500, 41], IN_TEAMS),
    (
        [150, 64, 2],
        {
            **{"dtype": HALF, "group": 7, "head_dim": 96, "num_bits": 96, "page_size": 64},
            **{"q_len": 3, "key_norms": True, "query_bits": 1},
        },
    ),
    (
        [200, 9],
        {
            **{"dtype": BFLOAT, "group": 8, "head_dim": 192, "num_bits": 128, "page_size": None},
            **{"q_len": 8, "key_norms": True, "query_bits": 2},
        },
    ),
    (
        [100, 37],
        {
            **{"dtype": HALF, "group": 20, "head_dim": 256, "num_bits": 160},
            **{"q_len": 2, "query_bits": 3},
        },
    ),
    (
        [77, 40],
        {
            **{"dtype": BFLOAT, "group": 3, "num_bits": 224, "layout": "hnd", "key_norms": True},
            **{"top_k": 1, "num_sink": 0, "num_recent": 0},
        },
    ),
    (
        [60, 17],
        {
            **{"dtype": HALF, "group": 16, "head_dim": 128, "num_bits": 256, "layout": "slice"},
            **{"q_len": 4, "top_k": 100},
        },
    ),
    (
        [5000],
        {
            **{"dtype": BFLOAT, "group": 4, "head_dim": 128, "num_bits": 128, "page_size": 64},
            **{"key_norms": True, "query_bits": 1, "top_k": 600},
        },
    ),
]
WITHOUT_TEAMS = ("two_kernels", "cluster")
ATTENDED = ("out", "lse", "dense", "dense_lse", "merged", "merged_lse")


def run(case: DecodeCase) -> dict[str, Tensor]:
    """The step taken apart, then decode_step on the caches as they were."""
    whole, caches, settings = case.clone(), case.caches, dict(case.settings)
    query_bits = settings.pop("query_bits")
    group = case.q.shape[2] // case.k.shape[2]
    scored = {"weight_sum": hata.plane_weight_sum(query_bits, group)}
    codes, key_norms = hata.hash_encode(case.k, case.key_weights, key_norms=True)
    rows = case.caches.clone()
    without_codes = (None, *rows.kv[:2], None, None, *rows.kv[2:])
    hata.cache_append(case.k, case.v, *without_codes)
    hata.cache_append(case.k, case.v, case.key_weights, *caches.all)
    planes = hata.encode_query(case.q, case.query_weights, query_bits=query_bits)
    scores = hata.hamming_score(planes, *caches.codes, max_seq_len=caches.capacity, **scored)
    settings |= {"return_cut": True}
    best, _, *best_cut = hata.select_topk(scores, caches.cache_seqlens, **settings)
    indices, num_selected, *cut = hata.score_select(planes, *caches.codes, **scored, **settings)
    fetched = hata.fetch_rows(
        *(indices[:, -1:].contiguous(), *caches.kv),
        **row_cache(caches, indices.shape[3] + 3),
    )
    out, lse = hata.gather_attention(case.q, *caches.kv, indices)
    dense, dense_lse = hata.dense_attention(case.q, *caches.kv)
    merged, merged_lse = hata.merge_attention_states(out, lse, dense, dense_lse)
    step_cut = whole.cut_buffers()
    step = whole.run(**step_cut)
    results = {
        **{"codes": codes, "key_norms": key_norms, "planes": planes, "scores": scores},
        **{f"fetched.{name}": t for name, t in fetched._asdict().items()},
        **{"best": best, "indices": indices, "num_selected": num_selected},
        **{"out": out, "lse": lse, "dense": dense, "dense_lse": dense_lse},
        **{"merged": merged, "merged_lse": merged_lse},
        **{f"step.{name}": t for name, t in (step._asdict() | step_cut).items()},
        **{f"{name}.cut": t for name, t in zip(step_cut, cut, strict=True)},
        **{f"{name}.best_cut": t for name, t in zip(step_cut, best_cut, strict=True)},
        **{"k_cache": caches.k_cache, "code_cache": caches.code_cache},
        **{"rows.k_cache": rows.k_cache, "rows.v_cache": rows.v_cache},
        **{"step.v_cache": whole.caches.v_cache, "step.code_cache": whole.caches.code_cache},
    }
    return {name: t.cpu() for name, t in results.items()}


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], case: DecodeCase) -> None:
    """Bit for bit, but for attention: two roundings to the dtype, on either device."""
    largest_v = case.caches.v_cache.float().nan_to_num().abs().max().item()
    tolerance = 4 * torch.finfo(case.q.dtype).eps * largest_v
    for name, e in expected.items():
        rounds = name.split(".")[-1] in ATTENDED
        torch.testing.assert_close(
            actual[name],
            e,
            rtol=0,
            atol=tolerance if rounds else 0,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def run_out_of_range(device: str) -> None:
    """Lengths and pages that do not exist, which only a GPU does not report: nothing is touched."""
    case = make_decode_case([40, 40, 40], device="cpu", key_norms=True).clone(device)
    wrong = torch.tensor([-3, INT32_MAX, case.caches.capacity + 2], dtype=torch.int32)
    case.caches.cache_seqlens.copy_(wrong)
    case.run()
    hata.dense_attention(case.q, *case.caches.kv)
    pages = torch.tensor([[-1] * 3, [INT32_MAX] * 3, [len(case.caches.k_cache)] * 3])
    case.caches.block_table.copy_(pages)
    case.caches.cache_seqlens.copy_(torch.tensor([30, 40, 20]))
    case.run()
    hata.dense_attention(case.q, *case.caches.kv)


def main(tool: str = "") -> None:
    """Runs all settings; `tool` is the one of compute-sanitizer that watches."""
    device = DEVICES[-1]
    for number, (seq_lens, setting) in enumerate(SETTINGS, start=1):
        torch.manual_seed(number)
        case = make_decode_case(seq_lens, device="cpu", draw=integer_vectors, **setting)
        os.environ["HATA_SCORE_SELECT"] = "auto"
        expected = run(case.clone())
        for algorithm in algorithms(device):
            # Teams wait at barriers of a part of the block, as often as each has tiles. racecheck
            # then reports accesses between which the machine code has a barrier of the whole block.
            in_teams = device == "cuda" and setting is IN_TEAMS and algorithm not in WITHOUT_TEAMS
            if tool == "racecheck" and in_teams:
                print(f"{device}: setting {number} by {algorithm} is left out")
                continue
            os.environ["HATA_SCORE_SELECT"] = algorithm
            compare(run(case.clone(device)), expected, case)
            if device == "cuda" and number == 1:
                run_out_of_range(device)
        print(f"{device}: setting {number} of {len(SETTINGS)} equals the CPU")


if __name__ == "__main__":
    main(*sys.argv[1:])
