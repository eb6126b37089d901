"""Count the baselines' messages as fedpet's are (fedpet/protocol/ledger.py)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedpet.protocol.flower_compat.flower_messages import make_message
from fedpet.protocol.ledger import Ledger
from fedpet.protocol.request import flower_bytes, single_client_bytes, to_record


@dataclass
class DenseLedger(Ledger):
    """Weigh the arrays of one message a round and direction, not of every one.

    What a tensor weighs depends on its shape alone (two tensors of equal bytes in one message
    are one object to Flower and weigh once, as LoRA's up-projections do before the first round).
    Serialising and hashing each of a round's messages of 91 MB would take longer than some
    rounds' training, so the arrays of the first message down and of the first up stand for
    those of all others; everything else of a message is weighed on that message.
    """

    _arrays_bytes: dict[tuple[int, bool], int] = field(default_factory=dict)

    def add_message(self, message: Message) -> None:
        """Count a message as it is sent or received."""
        if message.has_error():
            super().add_message(message)
            return
        is_reply = bool(message.metadata.reply_to_message_id)
        envelope = make_message(message.metadata, content=to_record(b""))
        self.current.wire_bytes += flower_bytes(envelope) - flower_bytes(to_record(b""))
        self.current.wire_bytes += self.weigh(message.content, is_reply=is_reply)
        self.current.messages += 1

    def weigh_alone(self, content: RecordDict, *, is_reply: bool) -> int:
        """Return the size of a message with this content, to or from one device alone."""
        envelope = single_client_bytes(0, reply=is_reply) - flower_bytes(to_record(b""))
        return envelope + self.weigh(content, is_reply=is_reply)

    def weigh(self, content: RecordDict, *, is_reply: bool) -> int:
        """Return the bytes of a message's records, arrays and their headers included."""
        (arrays,) = content.array_records.values()
        key = (self.current.round, is_reply)
        if key not in self._arrays_bytes:
            # New Array objects over the same bytes: weighing leaves chunks in an object, which
            # would then travel a second time.
            copied = {
                name: Array(array.dtype, array.shape, array.stype, array.data)
                for name, array in arrays.items()
            }
            self._arrays_bytes[key] = flower_bytes(ArrayRecord(copied))
        others = RecordDict(
            {
                name: ArrayRecord() if isinstance(record, ArrayRecord) else record
                for name, record in content.items()
            }
        )
        empty = flower_bytes(ArrayRecord())
        return flower_bytes(others) - empty + self._arrays_bytes[key]


class LedgerMixin(FedAvg):
    """Count each round's messages and seconds into `ledger`, in front of a strategy.

    A round's seconds run from before its messages are made until its replies are averaged.
    Evaluation is not among them.
    """

    ledger: Ledger

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.ledger.begin(server_round)
        self._round_started = time.perf_counter()
        return self._counted(super().configure_train(server_round, arrays, config, grid))

    def _counted(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Count messages as they are taken: a message that is sent need not be held."""
        for message in messages:
            self.ledger.add_message(message)
            yield message

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        for reply in replies:
            self.ledger.add_message(reply)
        averaged = super().aggregate_train(server_round, replies)
        record = self.ledger.current
        record.aggregated = averaged[0] is not None
        record.round_seconds = time.perf_counter() - self._round_started
        return averaged
