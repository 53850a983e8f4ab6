// Numbers as a person reads them, the same as the shell commands write (mfs/units.py, mfs/cli/text.py).

const UNITS = ["B", "K", "M", "G", "T"];
const NARROW = "\u00a0"; // number and unit stay on one line

export function size(bytes) {
  let value = bytes;
  let unit = 0;
  while (Math.abs(value) >= 999.5 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${value.toFixed(unit === 0 || value >= 99.95 ? 0 : 1)}${NARROW}${UNITS[unit]}`;
}

export const rate = (bytesPerSecond) => `${size(Math.round(bytesPerSecond))}/s`;

/** Never 0 % for something nor 100 % for less than all. */
export function share(part, whole) {
  if (!part || !whole) return `0${NARROW}%`;
  if (part >= whole) return `100${NARROW}%`;
  return `${Math.min(99, Math.max(1, Math.round((100 * part) / whole)))}${NARROW}%`;
}

export function duration(seconds) {
  const left = Math.max(0, Math.round(seconds));
  for (const [unit, lower, length, lowerLength] of [["d", "h", 86400, 3600], ["h", "m", 3600, 60], ["m", "s", 60, 1]]) {
    if (left >= length) {
      const rest = Math.floor((left % length) / lowerLength);
      return rest ? `${Math.floor(left / length)}${unit} ${rest}${lower}` : `${Math.floor(left / length)}${unit}`;
    }
  }
  return `${left}s`;
}

export const count = (number, one, many) =>
  `${number.toLocaleString("en")} ${number === 1 ? one : many || `${one}s`}`;

export const ago = (then) => (then ? `${duration(Date.now() / 1000 - then)} ago` : "never");
