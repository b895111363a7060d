"""Teachers: encoders whose vectors a student is trained to have.

    of(profile, row)            the encoder of a row of retrievers or teachers
    describe(profile, row)      what decides a baseline's vectors, in data/models/<row>

A retriever trained here reads the first tokens of a text. A baseline (lib/benchmark/rankers.py)
reads them too, or everything in windows, and the mean of their unit vectors is the text's vector.
A baseline's vectors are kept in data/embeddings, one for each window, under the sha256 of its text
and of all that decides them, so that rows, seeds and lengths share them. A damaged one is computed
again, a damaged file is refused (`hosted.CachedEncoder`).
"""

import json
import sys
from pathlib import Path

from lib.benchmark import rankers
from lib.benchmark.encoder import Encoder
from lib.model.tokens import load_tokenizer
from lib.pipeline import files, params
from lib.pipeline.errors import WorkbenchError


def of(profile: str, row: str, device: str = "cpu"):
    """The encoder of a teacher, in this process alone.

    Raises:
        ParamsError: no such row.
        CheckpointError, CorpusError, HostedError, RankerError: what it needs cannot be had.
    """
    design, data = params.load_for(profile), params.data(profile)
    params.known(row, design["retrievers"] | design["teachers"], "row of retrievers or teachers")
    if row in design["teachers"]:
        settings, kept = design["baselines"][row], data / "embeddings"
        if "url" in settings:
            return rankers.hosted(settings, load_tokenizer(data / "corpus"), kept)
        return rankers.sentence_transformer(settings, device, kept)
    from lib.model import checkpoint
    from lib.model.m2bert import M2BertForRetrieval

    model, tokenizer = checkpoint.load(data / "models" / row, M2BertForRetrieval)
    return Encoder(model.to(device), tokenizer, truncate=True)


def describe(profile: str, row: str) -> Path:
    """Write teacher.json: a row's settings and its model's fingerprint.

    Stages that learn from a baseline depend on this file, as others on a model's folder.
    """
    settings = params.load_for(profile)["baselines"][row]
    content = {"row": row, "settings": settings}
    if "url" not in settings:
        model = rankers.load_model(settings["model"], settings.get("revision"), "cpu")
        content["fingerprint"] = rankers.fingerprint(model)
    folder = params.data(profile) / "models" / row
    files.write(folder / "teacher.json", json.dumps(content, indent=1) + "\n")
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m lib.benchmark.teachers PROFILE ROW")
    try:
        describe(*sys.argv[1:])
    except WorkbenchError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}")
