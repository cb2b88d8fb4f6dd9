"""Problems from files: JSON lines, parquet, Hugging Face dataset folders. How they are graded is not decided here."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_dppo.errors import TaskError
from megatron_dppo.tasks.config import FieldsConfig
from megatron_dppo.tasks.problem_fields import AnswerKind, read_problem
from megatron_dppo.tasks.rows.row import Row, Rows
from megatron_dppo.tasks.task import Problem


class FileProblems:
    """The problems of one or several files, one per row; a row is read again whenever its problem is asked for.

    ``problem_fields`` says where the question and the answer of a row are looked for. Of an answer with ``####`` (GSM8K) only
    what follows the mark is kept; a number is kept digit by digit, without an exponent. The row's other fields are carried in
    the problem's metadata; a system prompt among them, or the chat's system message, replaces the task's. Null is the same as
    absent. Repeated ids and questions are fine.

    Args:
        name: the task's name in problem ids and logs.
        rows: of the files.
        fields: where a row has what.
        answer_kind: what the reward needs of the answer.
        checked: read every row now, so that one that cannot be used is an error now. False: when it is asked for.

    Raises:
        TaskError: a malformed row; its file and number are named.
    """

    def __init__(
        self, name: str, rows: Rows, fields: FieldsConfig, answer_kind: AnswerKind = "value", checked: bool = True
    ) -> None:
        self.name = name
        self._rows = rows
        self._fields = fields
        self._answer_kind: AnswerKind = answer_kind
        if checked:
            for problem in self.each():
                if isinstance(problem, TaskError):
                    raise problem

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < len(self):
            raise IndexError(f"task {self.name} has {len(self)} problems; there is no number {index}")
        return self._problem(index, self._rows[index])

    def each(self) -> Iterator[Problem | TaskError]:
        """Every row's problem in order, or what is wrong with the row."""
        for index, row in enumerate(self._rows):
            try:
                yield self._problem(index, row)
            except TaskError as error:
                yield error

    def _problem(self, index: int, row: Row) -> Problem:
        return read_problem(row, f"{self.name}/{index}", self._fields, self._answer_kind)
