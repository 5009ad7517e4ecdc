"""Numbers as readers like them: three figures, thousands apart, small ones as powers of ten."""

import math

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def figures(value: float | None, digits: int = 3) -> str:
    """A number to three significant figures: `1,240`, `0.0123`, `4.2·10⁻⁵`; a dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # after rounding: 0.09999 is 0.100
    if not -3 <= exponent < 7:
        mantissa, _, power = f"{value:.{digits - 2}e}".partition("e")
        return minus(f"{mantissa}·10{str(int(power)).translate(SUPERSCRIPTS)}")
    return minus(f"{value:,.{max(0, digits - 1 - exponent)}f}")


def minus(text: str) -> str:
    """A true minus sign instead of a hyphen."""
    return text.replace("-", "−")


def tick(value: float) -> str:
    """A round number without needless zeros, for axes."""
    size = abs(value)
    if 0 < size < 1e-3 or size >= 1e7:
        return figures(value, 2).removeprefix("1·")
    return minus(f"{value:.6g}" if size < 1000 else f"{value:,.0f}")


def whole_percent(value: float | None) -> str:
    """A share as a whole percentage, for accuracies of some hundred problems."""
    return "–" if value is None else minus(f"{100 * value:.0f}%")


def moment(text: str | None) -> str:
    """An ISO time as `2026-11-22 23:32 UTC`."""
    return "–" if not text else text[:16].replace("T", " ") + (" UTC" if text.endswith("+00:00") else "")


def percent(value: float | None) -> str:
    """A share as a percentage: whole from 10% on, one decimal from 0.1% on, then two."""
    if value is None:
        return "–"
    size = abs(100 * value)
    if 0 < size < 0.01:
        return "<0.01%"
    places = 0 if size >= 10 or size == 0 else 1 if size >= 0.1 else 2
    return minus(f"{100 * value:.{places}f}%")


def points(value: float | None) -> str:
    """A difference of shares in points, signed."""
    return "–" if value is None else minus(f"{100 * value:+.0f}")


def whole(value: float | None) -> str:
    """A count with thousands apart."""
    return "–" if value is None else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Seconds as `12 s`, `3 min 20 s`, `1 h 5 min`."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def memory(size: float | None) -> str:
    """Bytes as GiB or MiB."""
    if size is None:
        return "–"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round tick values inside [low, high], about as many as wanted."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, wanted)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]
