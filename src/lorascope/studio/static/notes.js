// Merging another person's file of notes.
import { one } from "./shared.js";
import { ask } from "./studio.js";

one("#merge").addEventListener("change", async (event) => {
  const file = event.target.files[0];
  if (!file) return;
  const said = one("#merged");
  try {
    const found = await ask("/notes/merge", { method: "POST", body: await file.text(), headers: { "content-type": "application/x-ndjson" } });
    said.textContent = `${found.added} new, ${found.known} known${found.unread ? `, ${found.unread} lines not read` : ""}.`;
    if (found.added) setTimeout(() => location.reload(), 800);
  } catch (error) {
    said.textContent = `Not merged: ${error.message}`;
  }
});
