"""What this machine has and what that allows: `print_diagnosis(diagnose(), console)`."""

from qlora_kit.doctor.judge import Diagnosis, Finding, judge
from qlora_kit.doctor.machine import Gpu, Machine, probe
from qlora_kit.doctor.show import print_diagnosis


def diagnose() -> Diagnosis:
    """Probes this machine and judges it. Opens no socket; imports torch to ask for graphics cards."""
    return judge(probe())


__all__ = ["Diagnosis", "Finding", "Gpu", "Machine", "diagnose", "judge", "print_diagnosis", "probe"]
