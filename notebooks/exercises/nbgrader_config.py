"""nbgrader's settings for these exercises: copy this file into the root of your course. INSTRUCTOR.md says why."""

import os

from nbgrader.preprocessors import (
    CheckCellMetadata,
    ClearOutput,
    ComputeChecksums,
    LockCells,
    NbGraderPreprocessor,
    OverwriteCells,
    OverwriteKernelspec,
    SaveCells,
)
from nbgrader.utils import is_grade, is_locked, is_solution


class Tidy(NbGraderPreprocessor):
    """Take out of a submission what would stop or fool nbgrader.

    A cell that was copied or split in JupyterLab keeps its id, and the last one counts; a tag such as skip-execution
    would hand out the points of a cell that never ran; a foreign schema version ends the run for all that come after.
    """

    def preprocess(self, notebook, resources):
        """Tidy one notebook."""
        seen = set()
        for cell in reversed(notebook.cells):
            cell.metadata.pop("tags", None)
            grading = cell.metadata.get("nbgrader")
            if not isinstance(grading, dict) or not (is_grade(cell) or is_solution(cell) or is_locked(cell)):
                cell.metadata.pop("nbgrader", None)
            elif grading.get("grade_id") in seen:
                del cell.metadata["nbgrader"]
            else:
                seen.add(grading["grade_id"])
                grading["schema_version"] = 3
        return notebook, resources


c = get_config()  # noqa: F821  # nbgrader reads this file with get_config in scope
c.CourseDirectory.course_id = "gradaccum"
# The notebooks come without answers: nothing to take out, and no stub in the place of a bug hunt's given code.
c.GenerateAssignment.preprocessors = [LockCells, ComputeChecksums, SaveCells, CheckCellMetadata]
c.Autograde.sanitize_preprocessors = [ClearOutput, Tidy, OverwriteKernelspec, OverwriteCells, CheckCellMetadata]
c.OverwriteCells.add_missing_cells = True  # a deleted check comes back
c.Execute.skip_cells_with_tag = "no-such-tag"
os.environ["GRADACCUM_PROGRESS"] = "off"  # a graded run neither reads nor writes what is kept for a learner
c.Execute.timeout = 60  # seconds for a cell; a check stops an endless answer after 10
