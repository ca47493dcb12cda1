"""Are evaluation samples held out from a row's training? Keys tell, where two sets of shards name the same pictures."""

from typing import Any

from v2flow.data.batches import SampleReader
from v2flow.data.openmoji import group_of
from v2flow.data.shard_names import folder_of, shard_places
from v2flow.data.shards import ShardSet, folder_manifest, open_shards
from v2flow.errors import V2FlowError


def check_held_out(evaluation: Any, training: Any, where: str) -> None:
    """Refuse evaluation pictures that are training pictures, or of a group with one.

    Keys are compared between shards of one folder, where a key names one picture; among OpenMoji's, whose manifest
    says so, groups of keys (skin tones of one drawing). Token shards keep the keys of their pictures.

    Raises:
        V2FlowError: names the shard or the key.
    """
    if training is None:
        return
    train, test = shard_places(training), shard_places(evaluation)
    if train & test:
        raise V2FlowError(
            f"{where}: evaluate.data: {min(train & test)} is also a training shard; expected held-out pictures"
        )
    for folder in {folder_of(place) for place in train} & {folder_of(place) for place in test}:
        known, tested = (
            _groups([place for place in sorted(places) if folder_of(place) == folder], folder)
            for places in (train, test)
        )
        shared = known & tested
        if shared:
            raise V2FlowError(
                f"{where}: evaluate.data: {len(shared)} groups of {folder} are in the training shards as well, "
                f"{min(shared)} among them; expected held-out pictures"
            )


def check_captions_held_out(evaluation: Any, training: Any, where: str) -> None:
    """Refuse captioned evaluation samples that are training samples, whatever folder and kind of shards they lie in.

    Token shards and the pictures that they were made of lie in two folders and share keys and captions. Where all keys
    that two sets share also have the same captions, they are taken for the same samples; two data sets that count
    their samples alike share keys but not all captions.

    Raises:
        V2FlowError: names a key.
    """
    train, test = (open_shards(shards, progress=False) for shards in (training, evaluation))
    known, tested = _samples_by_key(train), _samples_by_key(test)
    shared = sorted(known.keys() & tested.keys())
    readers = [SampleReader(shards, 1) for shards in (train, test)]
    if shared and all(readers[0].caption(known[k]) == readers[1].caption(tested[k]) for k in shared):
        raise V2FlowError(
            f"{where}: evaluate.data: {len(shared)} samples with their captions are in the training shards as well, "
            f"{shared[0]} among them; expected held-out captions"
        )


def _samples_by_key(shards: ShardSet) -> dict[str, int]:
    return {shards.key(sample): sample for sample in range(len(shards))}


def _groups(shards: list[str], folder: str) -> set[str]:
    opened = open_shards(shards, progress=False)
    keys = [opened.key(sample) for sample in range(len(opened))]
    build, _ = folder_manifest(folder)
    if build.get("kind") not in ("openmoji", "tokens"):
        return set(keys)
    try:
        return {group_of(key) for key in keys}
    except ValueError:  # token shards of other pictures: the keys are not code points
        return set(keys)
