"""Plan: the smallest student width that keeps a share of the features or stays below a loss, and what each width costs
in parameters.
"""

from tl_capacity.plan.answers import MethodPlan
from tl_capacity.plan.costs import ladder, teacher_config
from tl_capacity.plan.planning import check_goal, plan
from tl_capacity.plan.result import HookPlan, Plan, WidthCost

__all__ = ["HookPlan", "MethodPlan", "Plan", "WidthCost", "check_goal", "ladder", "plan", "teacher_config"]
