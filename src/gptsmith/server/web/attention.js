// The arithmetic behind the view of attention weights and of the logit lens. No DOM.

const COLOR_LEVELS = 6;

// The keys that a query attends to most: [{weight, index}], at most `count`, largest weight first.
export function strongestKeys(weights, query, count) {
  return weights[query]
    .slice(0, query + 1)
    .map((weight, index) => ({ weight, index }))
    .sort((a, b) => b.weight - a.weight)
    .slice(0, count);
}

// Why a query cannot attend to a key: "future", "window" (outside the sliding window) or null (it can).
// window: the number of positions a query sees, itself included; null if it sees all earlier ones.
export function maskReason(query, key, window) {
  if (key > query) return "future";
  return query - key >= (window ?? Infinity) ? "window" : null;
}

// The rectangles that the mask covers: [{x, y, width}] in cells, each one cell high.
export function maskRectangles(size, window) {
  const rectangles = [];
  for (let query = 0; query < size; query++) {
    rectangles.push({ x: query + 1, y: query, width: size - query - 1 });
    const hidden = query - (window ?? Infinity) + 1;
    if (hidden > 0) rectangles.push({ x: 0, y: query, width: hidden });
  }
  return rectangles;
}

// A color between low and high, each [red, green, blue]. The square root makes small weights visible.
export function weightColor(weight, low, high) {
  const t = Math.sqrt(weight);
  return `rgb(${low.map((from, channel) => Math.round(from + (high[channel] - from) * t)).join(" ")})`;
}

// What a token attends to within a picture of grid × grid patches: {total, patches}. total: the weight of all patches.
// patches: [{row, column, weight, share}], the strongest first; share: compared with the strongest, from 0 to 1.
export function patchAttention(weights, grid) {
  const most = Math.max(...weights);
  const patches = weights.map((weight, i) => ({
    row: Math.floor(i / grid),
    column: i % grid,
    weight,
    share: most > 0 ? weight / most : 0,
  }));
  return { total: weights.reduce((sum, w) => sum + w, 0), patches: patches.sort((a, b) => b.weight - a.weight) };
}

// The color of a prediction of the logit lens: "0" (unlikely) to "5" (likely).
export const lensLevel = (p) => String(Math.min(COLOR_LEVELS - 1, Math.floor(p * COLOR_LEVELS)));
