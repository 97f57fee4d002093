"""An experiment: reorder channels of a Llama-like model so that N:M loses less. Writes a dense model, same function.

    python tests/benchmarks/permutation.py MODEL OUTPUT --calibration TOKENS.safetensors --pattern 2:4
    python tests/benchmarks/quality.py OUTPUT ... --patterns 2:4     # and the same of MODEL

Columns of down_proj are free to be reordered together with rows of gate_proj and up_proj, columns of o_proj inside a
head together with rows of v_proj. Groups are dealt by score (RIA, ICLR 2024), then improved one slot at a time: the
columns in slot s of all groups are assigned to the groups anew, a linear sum assignment, since what a group of which
all others are fixed gains by one column depends on that pair alone. Needs scipy.
"""

import argparse

import torch
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_sparse.core import InputStats, Needs, parse_pattern


def order_of(score: Tensor, kept: int, group: int, rounds: int = 6, chunk: int = 512) -> Tensor:
    """Columns int64 [in] in an order in which the best `kept` of every `group` hold more of score [out, in] in sum."""
    width = score.shape[1]
    order = score.sqrt().sum(0).argsort(descending=True).view(group, width // group).T.contiguous()  # dealt
    generator = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        before = order.clone()
        for slot in range(group):
            for part in torch.randperm(len(order), generator=generator).split(chunk):
                fixed = score[:, torch.cat([order[part, :slot], order[part, slot + 1 :]], 1)]  # [out, groups, M - 1]
                bar = fixed.sort(-1, descending=True).values[
                    ..., kept - 1
                ]  # what a new column must beat, [out, groups]
                candidates = score[:, order[part, slot]]
                gain = torch.stack([torch.maximum(bar, column[:, None]).sum(0) for column in candidates.unbind(1)])
                candidate, place = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
                order[part[torch.from_numpy(place)], slot] = order[part[torch.from_numpy(candidate)], slot].clone()
        if torch.equal(order, before):
            break
    return order.flatten()


def saliency(weight: Tensor, stats: InputStats) -> Tensor:
    """w^2 / [G^-1]_jj."""
    return weight.float().square() / stats.inverse_factor(0.01).square().sum(0)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--calibration", required=True, help="`input_ids` [samples, tokens] in safetensors")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--pattern", default="2:4")
    args = parser.parse_args()
    pattern = parse_pattern(args.pattern)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, device_map=device)
    ids = load_file(args.calibration)["input_ids"][: args.samples].long().to(device)
    layers = model.model.layers
    stats: dict[torch.nn.Module, InputStats] = {}
    for layer in layers:
        for linear in (layer.mlp.down_proj, layer.self_attn.o_proj):
            stats[linear] = InputStats(linear.in_features, Needs.GRAM, device)
            linear.register_forward_pre_hook(lambda module, inputs: stats[module].update(inputs[0].flatten(0, -2)))
    for part in ids.split(4):
        model.model(part)
    for linear in stats:
        linear._forward_pre_hooks.clear()
    wanted = model(ids[:1]).logits
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    for layer in layers:
        down, attention = layer.mlp.down_proj, layer.self_attn
        order = order_of(saliency(down.weight, stats[down]), pattern.kept, pattern.group).to(device)
        down.weight.data = down.weight[:, order]
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight.data = linear.weight[order]
        o, v = attention.o_proj, attention.v_proj
        out, width = o.weight.shape
        size, shared = width // heads, heads // kv_heads
        score = saliency(o.weight, stats[o]).view(out, kv_heads, shared, size)
        weight, values = o.weight.data.view(out, kv_heads, shared, size), v.weight.data.view(kv_heads, size, -1)
        for head in range(kv_heads):
            order = order_of(score[:, head].reshape(-1, size), pattern.kept, pattern.group).to(device)
            weight[:, head] = weight[:, head][:, :, order]
            values[head] = values[head][order]
    print(f"largest change of a logit: {(model(ids[:1]).logits - wanted).abs().max().item():.2g}")
    model.save_pretrained(args.output)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.output)


if __name__ == "__main__":
    main()
