// Which picture files are taken, and in what size. No DOM.

export const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const MAX_SIDE = 768; // pixels of a picture that is sent
const MAX_KEPT = 64_000; // bytes of a file that is sent as it is

export const isPicture = ({ type }) => TYPES.includes(type);

const fits = ({ width, height }) => Math.max(width, height) <= MAX_SIDE;

// Whether a file is sent as it is: a small picture keeps its exact pixels. size: {width, height} of the picture.
export const mayKeep = (file, size) => file.size <= MAX_KEPT && fits(size);

// The size in which a picture is sent: {width, height}, with its proportions.
export function fittingSize({ width, height }) {
  const scale = Math.min(1, MAX_SIDE / Math.max(width, height));
  return { width: Math.max(1, Math.round(width * scale)), height: Math.max(1, Math.round(height * scale)) };
}
