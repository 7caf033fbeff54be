"""Where each known content key lies: a sorted array in place of a dictionary of millions of byte strings."""

import numpy as np


class KeyIndex:
    """Looks up 32-byte keys in an array of them; 16 bytes of memory per key beside the array itself."""

    def __init__(self, keys: np.ndarray) -> None:
        """Args: keys: [K, 32] uint8. Of equal keys, the first is found."""
        self._keys = np.ascontiguousarray(keys)
        prefixes = _prefixes(self._keys)
        self._order = np.argsort(prefixes, kind="stable")
        self._sorted = prefixes[self._order]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The index of each key of `keys` [n, 32] uint8, -1 where it is not known: [n] int64."""
        found = np.full(len(keys), -1, np.int64)
        if not len(self._sorted):
            return found
        wanted = np.ascontiguousarray(keys)
        places = np.searchsorted(self._sorted, prefixes := _prefixes(wanted))
        unsettled = np.arange(len(wanted))
        while len(unsettled):  # one pass, unless two keys share their first 8 bytes
            inside = places[unsettled] < len(self._sorted)
            unsettled = unsettled[inside]
            unsettled = unsettled[self._sorted[places[unsettled]] == prefixes[unsettled]]
            candidates = self._order[places[unsettled]]
            equal = (self._keys[candidates] == wanted[unsettled]).all(axis=1)
            found[unsettled[equal]] = candidates[equal]
            unsettled = unsettled[~equal]
            places[unsettled] += 1
        return found

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: bytes) -> bool:
        return bool(self.find(np.frombuffer(key, np.uint8)[None])[0] >= 0)


def _prefixes(keys: np.ndarray) -> np.ndarray:
    """The first 8 bytes of each key as one number."""
    return keys[:, :8].copy().view(">u8")[:, 0].astype(np.uint64)
