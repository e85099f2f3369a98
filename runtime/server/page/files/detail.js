// The experts in the slots of one cell of the map.

import { byId, make } from "./elements.js";
import { percent } from "./format.js";

const title = byId("detail-title");
const says = byId("detail-says");
const list = byId("slots");

export function showDetail(placement, copies, loads, [layer, gpu], words) {
  const [where, what] = words.split(": ");
  const active = loads && loads.totals[layer] ? ` ${loads.active[layer][gpu].toFixed(1)} of them are active in a step.` : "";
  title.textContent = where;
  says.textContent = `${what}.${active}`;
  const experts = placement.slots[layer][gpu];
  while (list.children.length > experts.length) list.lastElementChild.remove();
  const shares = loads ? loads.shares[layer][gpu] : experts.map(() => 0);
  // Bars are as long as the layer's busiest slot is full.
  const longest = loads ? Math.max(...loads.shares[layer].flat()) : 0;
  experts.forEach((expert, slot) => {
    fill(list.children[slot] || list.appendChild(makeSlot()), expert, copies[layer].get(expert), shares[slot], longest);
  });
}

function makeSlot() {
  return make("li", {}, make("span"), make("span", { className: "copies" }), make("span"), make("span", { className: "bar" }));
}

function fill(item, expert, gpus, share, longest) {
  const [name, held, part, bar] = item.children;
  name.textContent = `Expert ${expert}`;
  part.textContent = longest ? percent(share) : "–";
  held.textContent = gpus.length > 1 ? `${gpus.length} copies: GPU ${gpus.join(", ")}` : "1 copy";
  bar.style.width = `${longest ? (100 * share) / longest : 0}%`;
}
