// Numbers as a person reads them, and the places of ticks.

const SUPERSCRIPTS = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

/** With three to four digits, as a power of ten where it is very small or very large. */
function plain(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) {
    const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
    const power = [...String(Number(exponent))].map((letter) => SUPERSCRIPTS[letter]).join("");
    const short = String(Number(mantissa));
    return short === "1" ? `10${power}` : short === "-1" ? `−10${power}` : `${short.replace("-", "−")}×10${power}`;
  }
  const text = size >= 1000 ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(digits)));
  return text.replace("-", "−");
}

/** With its unit. */
function withUnit(value, unit) {
  if (value === null || value === undefined) return "–";
  if (unit === "share") return `${plain(value * 100)} %`;
  if (unit === "bytes") return bytes(value);
  if (unit === "s") return seconds(value);
  return unit ? `${plain(value)} ${unit}` : plain(value);
}

function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = value > 0 ? Math.min(Math.floor(Math.log10(value) / 3), units.length - 1) : 0;
  return `${plain(value / 1000 ** power)} ${units[Math.max(power, 0)]}`;
}

function seconds(value) {
  if (value < 0.001) return `${plain(value * 1e6, 2)} µs`;
  if (value < 1) return `${plain(value * 1000, 2)} ms`;
  if (value < 120) return `${plain(value)} s`;
  if (value < 7200) return `${Math.floor(value / 60)} min ${String(Math.round(value % 60)).padStart(2, "0")} s`;
  return `${Math.floor(value / 3600)} h ${String(Math.round((value % 3600) / 60)).padStart(2, "0")} min`;
}

/** Round places between two ends, about so many. */
function ticks(low, high, count) {
  const raw = (high - low) / Math.max(count, 1);
  if (!(raw > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(raw));
  const factors = power >= 10 || raw < 0.2 ? [1, 2, 2.5, 5, 10] : [1, 2, 5, 10];
  const step = factors.map((factor) => factor * power).find((candidate) => candidate >= raw * 0.999);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) found.push(at * step);
  return found;
}

/** Powers of ten between two ends; where there are few, their doubles and fivefolds too. */
function logTicks(low, high, count) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const every = Math.max(Math.ceil((last - first) / count), 1);
  const found = [];
  for (let power = first; power <= last; power += every) {
    for (const factor of last - first <= 2 ? [1, 2, 5] : [1]) {
      const value = factor * 10 ** power;
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  }
  return found;
}

function quantile(sorted, share) {
  return sorted[Math.min(Math.max(Math.round(share * (sorted.length - 1)), 0), sorted.length - 1)];
}
