// A table whose rows stay where they are while their numbers change. On a phone each row is a card.

import { h, keyed, setAttributes, setText } from "./dom.js";

export class Table {
  // `columns`: {label, of(item) -> text or {text, note, wide, title, bar, class}, number, head, minor: not on a phone}
  constructor(parent, { label, columns, empty }) {
    this.columns = columns;
    this.body = h("tbody", {});
    this.none = h("p", { class: "none" }, empty);
    this.table = h(
      "table", { class: "cards" },
      h("caption", { class: "hidden" }, label),
      h("thead", {}, h("tr", {}, columns.map((each) => h("th", { scope: "col", class: classes(each), title: each.title }, each.label)))),
      this.body,
    );
    parent.append(h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, this.table), this.none);
  }

  update(items, keyOf, rowClass = () => "") {
    this.none.hidden = items.length > 0;
    this.table.parentElement.hidden = !items.length;
    keyed(this.body, items, keyOf, (item) => this.make(item), (row, item) => {
      const pointed = keyOf(item) === this.pointed ? "pointed" : "";
      setAttributes(row, { class: `${rowClass(item)} ${pointed}`.trim() || null, "data-key": keyOf(item) });
      this.columns.forEach((column, k) => write(row.children[k], column.of(item)));
    });
  }

  make() {
    return h(
      "tr", {},
      this.columns.map((column) =>
        h(
          column.head ? "th" : "td",
          { scope: column.head ? "row" : null, class: classes(column), "data-label": column.label },
          h("span", { class: "value" }), h("span", { class: "note" }),
        ),
      ),
    );
  }

  // Mark the row of an item, and bring it into view.
  point(key) {
    this.pointed = key;
    for (const row of this.body.children) {
      const here = row.dataset.key === key;
      row.classList.toggle("pointed", here);
      if (here) row.scrollIntoView({ block: "nearest" });
    }
  }
}

const classes = (column) => [column.number && "number", column.minor && "minor"].filter(Boolean).join(" ") || null;

function write(cell, said) {
  const told = typeof said === "object" && said !== null ? said : { text: said };
  const [value, note] = cell.children;
  setText(value, told.text);
  setText(note, told.note ?? "");
  note.hidden = !told.note;
  setAttributes(cell, { title: told.title ?? null });
  setAttributes(note, { class: told.wide ? "note wide" : "note" });
  setAttributes(value, { class: `value ${told.class ?? ""}`.trim() });
  bar(cell, told.bar);
}

function bar(cell, share) {
  let track = cell.children[2];
  if (share === undefined || share === null) {
    track?.remove();
    return;
  }
  if (!track) cell.append((track = h("span", { class: "bar", "aria-hidden": "true" }, h("span", {}))));
  track.firstElementChild.style.width = `${Math.round(100 * Math.max(0, Math.min(1, share)))}%`;
}
