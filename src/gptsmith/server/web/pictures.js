// Pictures that a person adds to a message: chosen with a button, pasted, or dropped. They are kept small, since the model
// sees few pixels of them, and the browser stores them with the conversation.

import { h, icon, iconButton, toast } from "./dom.js";
import { fittingSize, isPicture, mayKeep, TYPES } from "./picture-files.js";

const QUALITY = 0.88; // of the JPEG that a large picture becomes

// Resolve to a data: URL of a picture file. Raise an Error for a file that the browser cannot read.
async function readPicture(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file); // the first frame, turned as the camera was
  } catch {
    throw new Error(`${file.name || "The picture"} is damaged, or in a format that this browser cannot read.`);
  }
  try {
    if (mayKeep(file, bitmap)) return await dataUrl(file);
    const canvas = h("canvas", fittingSize(bitmap));
    const context = canvas.getContext("2d");
    context.fillStyle = "white"; // where the picture is transparent, as the server does
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL("image/jpeg", QUALITY);
  } finally {
    bitmap.close();
  }
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(new Error(`${file.name} cannot be read.`)));
    reader.readAsDataURL(file);
  });
}

// The pictures of a message that is being written: a button that opens files, and thumbnails that can be removed.
export class PictureInput {
  urls = [];
  #enabled = false;

  // limit: the most pictures. target: the element that pictures are dropped and pasted on. onChange(): urls has changed.
  // refusal(): why pictures cannot be added, for a model that reads text only.
  constructor({ limit, target, refusal, onChange = () => {} }) {
    Object.assign(this, { limit, refusal, onChange });
    this.file = h("input", {
      type: "file",
      accept: TYPES.join(","),
      multiple: limit > 1,
      hidden: true,
      onchange: () => {
        this.add([...this.file.files]);
        this.file.value = ""; // the same file can be chosen again
      },
    });
    this.button = h(
      "button.icon-button",
      {
        type: "button",
        "aria-label": "Add a picture",
        title: "Add a picture (or paste it, or drop it here)",
        hidden: true,
        onclick: () => this.file.click(),
      },
      icon("picture"),
    );
    this.list = h("ul.thumbnails", { "aria-label": "Pictures", hidden: true });
    target.addEventListener("paste", (event) => {
      if (event.clipboardData.files.length) this.#take(event, event.clipboardData.files);
    });
    const carriesFiles = (event) => [...event.dataTransfer.types].includes("Files");
    target.addEventListener("dragover", (event) => {
      if (!carriesFiles(event)) return;
      event.preventDefault();
      target.classList.add("dropping");
    });
    target.addEventListener("dragleave", (event) => {
      if (!target.contains(event.relatedTarget)) target.classList.remove("dropping");
    });
    target.addEventListener("drop", (event) => {
      target.classList.remove("dropping");
      if (carriesFiles(event)) this.#take(event, event.dataTransfer.files);
    });
  }

  // Whether the selected model reads pictures.
  set enabled(value) {
    this.#enabled = value;
    this.button.hidden = !value;
  }

  #take(event, files) {
    event.preventDefault();
    this.add([...files]);
  }

  async add(files) {
    if (!this.#enabled) {
      toast(this.refusal(), "error");
      return;
    }
    for (const file of files) {
      if (!isPicture(file)) toast(`${file.name} is no PNG, JPEG, WebP or GIF picture.`, "error");
      else if (this.urls.length >= this.limit && this.limit > 1) {
        toast(`A message takes at most ${this.limit} pictures.`, "error");
        break;
      } else {
        try {
          const url = await readPicture(file);
          this.set(this.limit === 1 ? [url] : [...this.urls, url]);
        } catch (error) {
          toast(error.message, "error");
        }
      }
    }
  }

  set(urls) {
    this.urls = urls;
    this.list.hidden = !urls.length;
    this.list.replaceChildren(
      ...urls.map((url, i) =>
        h(
          "li",
          {},
          h("img", { src: url, alt: `Picture ${i + 1}` }),
          iconButton("close", `Remove picture ${i + 1}`, () => {
            this.set(urls.toSpliced(i, 1));
            (this.list.querySelector("button") ?? this.button).focus();
          }),
        ),
      ),
    );
    this.onChange();
  }
}
