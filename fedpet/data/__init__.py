"""Turn labelled text into tokenised rows and the clients that own them.

In:  a `DataConfig` and a `ClientsConfig`, and the folder of a tokeniser.
Out: a `FederatedData`: the task, the rows to train and evaluate on, the clients and their rows.
"""

from fedpet.data.census import ClientCounts, count_clients
from fedpet.data.classes import ClassCount, count_classes, describe_classes
from fedpet.data.dataset import FederatedData, load_data, load_evaluation
from fedpet.data.partition import Client, partition_with
from fedpet.data.row_books import RowBooks
from fedpet.data.rows import Rows
from fedpet.data.tokenize import hash_tokenizer
from fedpet.tasks import Task

__all__ = [
    "ClassCount",
    "Client",
    "ClientCounts",
    "FederatedData",
    "RowBooks",
    "Rows",
    "Task",
    "count_classes",
    "count_clients",
    "describe_classes",
    "hash_tokenizer",
    "load_data",
    "load_evaluation",
    "partition_with",
]
