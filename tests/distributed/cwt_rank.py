"""One rank of a check: float64 gradients of contrast with local and global negatives, ranks holding unequal shares."""

import torch
import torch.distributed as dist

from sparselt_dist.data.batch import IGNORE_INDEX, Batch
from sparselt_dist.objectives.contract import TINY_TOKENIZER, TinyBackbone, tiny_examples
from sparselt_dist.objectives.cwt import CWT
from sparselt_dist.objectives.settings import CWTConfig


def collate(rows: slice) -> Batch:
    """Rows of the tiny examples; an empty slice gives a row without a target."""
    collator = CWT().build_collator(CWTConfig(mlm_probability=0.4), TINY_TOKENIZER)
    examples = tiny_examples()[rows]
    batch = collator(examples or tiny_examples()[:1])
    if not examples:
        nothing = torch.zeros((), dtype=torch.int64)
        batch = {**batch, "labels": torch.full_like(batch["labels"], IGNORE_INDEX), "num_targets": nothing}
    return batch


def model(**settings: object) -> tuple[TinyBackbone, torch.nn.Module]:
    """Float64, the same on every rank."""
    torch.manual_seed(0)
    backbone = TinyBackbone(has_head=False).double()
    backbone.embedding.weight.data *= 3  # away from the flat beginning
    cfg = CWTConfig(mlm_probability=0.4, **settings)  # type: ignore[arg-type]
    return backbone, CWT().build_module(cfg, backbone)


def gradients(batch: Batch, **settings: object) -> torch.Tensor:
    """All gradients of the mean loss of a batch, one after another."""
    backbone, module = model(**settings)
    loss = module(backbone, batch).loss
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(backbone.parameters()))])


def shares(ranks: int) -> list[slice]:
    """Unequal, the last one empty where there are more than two ranks."""
    return [slice(0, 5), slice(5, 8)] if ranks == 2 else [slice(0, 3), slice(3, 4), slice(4, 8), slice(8, 8)]


def main() -> None:
    dist.init_process_group("gloo")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    own, whole = collate(shares(ranks)[rank]), collate(slice(None))
    weight = float(own["num_targets"]) / float(whole["num_targets"])
    for form in ("full", "deduplicated"):
        summed = gradients(own, negatives="global", form=form) * weight
        dist.all_reduce(summed)
        expected = gradients(whole, negatives="local", form="full")
        assert (summed - expected).abs().max() <= 1e-10, (form, (summed - expected).abs().max())
        assert expected.abs().max() > 1e-2
        plain = gradients(own, negatives="global", form=form) / ranks
        dist.all_reduce(plain)
        assert (plain - expected).abs().max() > 1e-3, "a mean of means would have done"
        local = gradients(own, negatives="local", form=form) * weight
        dist.all_reduce(local)
        parts = [collate(share) for share in shares(ranks)]
        expected_local = sum(gradients(part, form=form) * float(part["num_targets"]) for part in parts)
        assert (local - expected_local / float(whole["num_targets"])).abs().max() <= 1e-10
        assert (local - expected).abs().max() > 1e-3, "local negatives gave the global result"
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
