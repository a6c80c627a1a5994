// The arithmetic of a line chart: ranges, ticks, paths. No DOM.

// Round numbers in [low, high], about `count` of them.
export function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((m) => m * power >= rough) * power;
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high + step * 1e-9; n++) found.push(n * step);
  return found;
}

// Round numbers for a logarithmic axis: powers of ten, with 2 and 5 in between if the range is short.
export function logTicks(low, high) {
  if (high / low < 8) return ticks(low, high, 5).filter((y) => y > 0);
  const multiples = high / low > 1000 ? [1] : [1, 2, 5];
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const m of multiples) {
      const y = m * 10 ** power;
      if (y >= low * (1 - 1e-9) && y <= high * (1 + 1e-9)) found.push(y); // 10 ** -4 is a little less than 1e-4
    }
  }
  return found;
}

// The index of the value that is nearest to x. sorted: ascending numbers, at least one.
export function nearestIndex(sorted, x) {
  let [low, high] = [0, sorted.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low > 0 && x - sorted[low - 1] <= sorted[low] - x ? low - 1 : low;
}

// Map data to pixels. points: [[x, y], ...] with y !== null, and y > 0 if logarithmic. min: a value of y that a linear
// axis must include. box: {left, top, width, height} of the plotting area.
// Return {x0, x1, low, high, toX, toY}: the range of x, that of y with its margins, and the two mappings.
export function makeScale(points, { logarithmic = false, min, box }) {
  let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
  for (const [x, y] of points) {
    x0 = Math.min(x0, x);
    x1 = Math.max(x1, x);
    y0 = Math.min(y0, y);
    y1 = Math.max(y1, y);
  }
  if (min !== undefined && !logarithmic) y0 = Math.min(y0, min);
  if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
  const forward = logarithmic ? Math.log : (y) => y;
  const inverse = logarithmic ? Math.exp : (y) => y;
  const margin = 0.05 * (forward(y1) - forward(y0)) || Math.abs(forward(y1)) * 0.1 || 1;
  const bottom = forward(y0) - (min === y0 ? 0 : margin);
  const top = forward(y1) + margin;
  return {
    x0,
    x1,
    low: inverse(bottom),
    high: inverse(top),
    toX: (x) => box.left + ((x - x0) / (x1 - x0)) * box.width,
    toY: (y) => box.top + (1 - (forward(y) - bottom) / (top - bottom)) * box.height,
  };
}

// The path data of a line in SVG. A y of null, or one that a logarithmic axis cannot show, interrupts it.
export function linePath(points, { toX, toY }, logarithmic = false) {
  let path = "";
  let command = "M";
  for (const [x, y] of points) {
    if (y === null || (logarithmic && y <= 0)) command = "M";
    else {
      path += `${command}${toX(x).toFixed(1)} ${toY(y).toFixed(1)}`;
      command = "L";
    }
  }
  return path;
}
