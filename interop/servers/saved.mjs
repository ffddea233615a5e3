// A map that is written to a file with each change, so that it outlives its process.
import { readFileSync, renameSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { deserialize, serialize } from "node:v8";

export class Saved extends Map {
  #file;

  /** @param folder where the file is; without one, the map is in memory only */
  constructor(folder) {
    super();
    const file = folder && join(folder, "saved");
    try {
      for (const [key, value] of file ? deserialize(readFileSync(file)) : []) super.set(key, value);
    } catch (error) {
      if (error.code !== "ENOENT") throw error;
    }
    this.#file = file;
  }

  set(key, value) {
    super.set(key, value);
    this.save();
    return this;
  }

  delete(key) {
    const deleted = super.delete(key);
    this.save();
    return deleted;
  }

  /** Writes all to the file. To be called after a change within a value. */
  save() {
    if (!this.#file) return;
    writeFileSync(`${this.#file}.new`, serialize(new Map(this)));
    renameSync(`${this.#file}.new`, this.#file);
  }
}
