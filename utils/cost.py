"""How long things take, in words."""


def format_duration(span: float) -> str:
    """Seconds in words: 45 s, 12 min, 3.4 h."""
    if span < 100:
        return f"{span:.0f} s"
    return f"{span / 60:.0f} min" if span < 6000 else f"{span / 3600:.1f} h"
