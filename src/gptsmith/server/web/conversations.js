// All conversations of this browser, one record each. Tabs add to the records and never replace them. No DOM.

import { fromList, isConversation, merge } from "./conversation.js";
import { load, names, onOtherTab, remove, save } from "./store.js";

const RECORD = "conversation.";
const OLD_LIST = "conversations"; // one list of all, in which older pages stored them

export class ConversationStore {
  #conversations = new Map(); // by id
  #deleted = new Set(); // ids

  // onChange(conversation): another tab has changed it. onDelete(conversation): another tab has deleted it.
  constructor({ onChange = () => {}, onDelete = () => {} } = {}) {
    Object.assign(this, { onChange, onDelete });
    for (const name of names(RECORD)) {
      const conversation = load(name, null);
      if (isConversation(conversation)) this.#conversations.set(conversation.id, conversation);
    }
    this.#convertOldList();
    onOtherTab((name, record) => {
      if (name.startsWith(RECORD)) this.#onRecord(name.slice(RECORD.length), record);
    });
  }

  // From the newest to the oldest.
  list() {
    return [...this.#conversations.values()].sort((a, b) => b.updated - a.updated);
  }

  // Store a conversation, joined with what other tabs have added to it. Return whether that worked.
  save(conversation) {
    const { id } = conversation;
    if (this.#deleted.has(id)) return true;
    this.#conversations.set(id, conversation);
    const stored = load(RECORD + id, null);
    if (isConversation(stored)) merge(conversation, stored);
    return save(RECORD + id, conversation);
  }

  delete({ id }) {
    this.#deleted.add(id);
    this.#conversations.delete(id);
    remove(RECORD + id);
  }

  #onRecord(id, record) {
    const known = this.#conversations.get(id);
    if (record === null) {
      this.#deleted.add(id);
      this.#conversations.delete(id);
      if (known) this.onDelete(known);
    } else if (this.#deleted.has(id)) {
      remove(RECORD + id); // the other tab wrote before it knew of the deletion
    } else if (isConversation(record)) {
      if (!known) this.#conversations.set(id, record);
      else if (merge(known, record)) save(RECORD + id, known); // both tabs wrote at the same time
      this.onChange(this.#conversations.get(id));
    }
  }

  // An entry leaves the list once its record is stored, so that a full storage loses nothing.
  #convertOldList() {
    const list = load(OLD_LIST, []);
    if (!Array.isArray(list)) return;
    let stored = true;
    for (const old of list.toReversed()) {
      const conversation = fromList(old);
      if (conversation) {
        const known = this.#conversations.get(conversation.id) ?? conversation;
        merge(known, conversation);
        stored &&= this.save(known);
        this.#conversations.set(known.id, known);
      }
      if (stored) save(OLD_LIST, list.slice(0, list.lastIndexOf(old)));
    }
    if (stored) remove(OLD_LIST);
  }
}
