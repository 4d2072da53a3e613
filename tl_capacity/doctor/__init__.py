"""`doctor`: reads the first thousand tokens of a long measurement and finds what would spoil it, such as a silent hook,
an SAE of another model, or a full disk.

Every check ends in one `Finding`; a check that cannot be made because an earlier one failed is left out.
"""

from __future__ import annotations

from tl_capacity.doctor.examination import examine as examine
from tl_capacity.doctor.examination import examine_folder as examine_folder
from tl_capacity.doctor.finding import CHANGE as CHANGE
from tl_capacity.doctor.finding import OK as OK
from tl_capacity.doctor.finding import STOP as STOP
from tl_capacity.doctor.finding import Finding as Finding
