// The page's elements. All text is set as text: what a model writes is never read as HTML.

export function byId(id) {
  return document.getElementById(id);
}

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export function show(element, visible) {
  element.hidden = !visible;
}

// A notice that is shown while it says something.
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
  show(element, text !== "");
}

// Names and values as a description list; the elements stay, so that what has not changed is not announced or drawn again.
export function fillFacts(list, facts) {
  while (list.children.length > facts.length) list.lastElementChild.remove();
  facts.forEach(([name, value, note = ""], index) => {
    if (!list.children[index]) list.append(make("div", {}, make("dt"), make("dd"), make("dd", { className: "note" })));
    const [term, main, beside] = list.children[index].children;
    for (const [element, text] of [[term, name], [main, value], [beside, note]]) {
      if (element.textContent !== text) element.textContent = text;
    }
    show(beside, note !== "");
  });
}

// Keeps a scrolled box at its end, unless its reader has scrolled up.
export function appendText(box, node, text) {
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  node.appendData(text);
  if (atEnd) box.scrollTop = box.scrollHeight;
}
