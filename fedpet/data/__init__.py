"""Data: labelled text in, tokenised rows and the clients that own them out.

    sources -> task -> tokenise -> rows (through the cache) -> partition -> load -> classes

In:  a `DataConfig` and a `PopulationConfig`, and the folder of a tokeniser.
Out: a `FederatedData`: the task, the rows to train and evaluate on, the clients and their rows.
"""

from fedpet.data.classes import ClassCount, count_classes, describe_classes
from fedpet.data.load import (
    Census,
    FederatedData,
    RowBooks,
    load_data,
    load_evaluation,
    take_census,
)
from fedpet.data.partition import Client, partition_with
from fedpet.data.rows import Rows
from fedpet.data.task import Task
from fedpet.data.tokenise import hash_tokenizer

__all__ = [
    "Census",
    "ClassCount",
    "Client",
    "FederatedData",
    "RowBooks",
    "Rows",
    "Task",
    "count_classes",
    "describe_classes",
    "hash_tokenizer",
    "load_data",
    "load_evaluation",
    "partition_with",
    "take_census",
]
