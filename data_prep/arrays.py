"""What the arrays of this package hold, an alias a dtype. Shapes are told where they are made."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]  # of several dtypes, by name or by column

Tokens = np.ndarray[Any, np.dtype[np.uint16 | np.uint32]]  # token ids, as they are stored
Ids = np.ndarray[Any, np.dtype[np.int32]]  # token ids, as a tokenizer gives them
Lengths = np.ndarray[Any, np.dtype[np.uint32]]  # tokens or bytes of documents
Counts = np.ndarray[Any, np.dtype[np.int64]]  # numbers of things, and places of things in arrays
Flags = np.ndarray[Any, np.dtype[np.bool_]]
Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Shares = np.ndarray[Any, np.dtype[np.float64]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Fingerprints = np.ndarray[Any, np.dtype[np.void]]  # data_prep.dedup.FINGERPRINT, a document each
