// Numbers, durations and token texts in the form that people read. No DOM.

const MISSING = "–";

export function percent(p) {
  if (p >= 0.0995) return `${(100 * p).toFixed(0)}%`;
  return p >= 0.00095 ? `${(100 * p).toFixed(1)}%` : "<0.1%";
}

// 1234567 -> "1.2M"
export function compactNumber(n) {
  if (n === null || n === undefined) return MISSING;
  const units = [
    [1e12, "T"],
    [1e9, "B"],
    [1e6, "M"],
    [1e3, "k"],
  ];
  for (const [size, letter] of units) {
    if (Math.abs(n) >= size) return `${(n / size).toFixed(Math.abs(n) / size < 10 ? 1 : 0)}${letter}`;
  }
  return `${Math.round(n)}`;
}

// All digits up to a million: 12345 -> "12,345"
export const exactNumber = (n) => (n < 1e6 ? Math.round(n).toLocaleString("en") : compactNumber(n));

// Three significant digits, and scientific notation below 0.001: 0.0003 -> "3.0e-4"
export function significant(y) {
  if (y === 0) return "0";
  return Math.abs(y) >= 0.001 ? String(Number(y.toPrecision(3))) : y.toExponential(1);
}

// 3725 -> "1 h 02 min"
export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return MISSING;
  const whole = Math.max(0, Math.round(seconds));
  const minutes = Math.floor(whole / 60);
  const twoDigits = (n) => String(n).padStart(2, "0");
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${minutes} min ${twoDigits(whole % 60)} s`;
  return `${Math.floor(whole / 3600)} h ${twoDigits(minutes % 60)} min`;
}

// One unit only, for the ticks of an axis: 3725 -> "62.1 min"
export function shortDuration(seconds) {
  if (seconds === undefined) return MISSING;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 6) / 10} min` : `${(seconds / 3600).toFixed(1)} h`;
}

// A token's text with symbols in place of white space.
export function printable(text) {
  if (text === "") return "∅";
  return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}

const LINE_ENDS = { "\n": "⏎", "\r": "␍" };

// A token's text in parts: {text, glyph}. glyph: a symbol to show before a part that has no width of its own, so that
// it can be seen and pointed at; undefined for the others.
export function glyphs(text) {
  if (text === "") return [{ text, glyph: "∅" }];
  if (/^[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]+$/u.test(text) && !/[\n\r\t]/.test(text)) return [{ text, glyph: "·" }];
  const parts = text.split(/([\n\r])/).filter(Boolean);
  return parts.map((part) => ({ text: part, glyph: LINE_ENDS[part] }));
}
