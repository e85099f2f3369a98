// Draws every chart once, again when its selectors change, and all of them when colours or width change.

const CHARTS = {
  "popularity-chart": drawPopularity,
  "skew-chart": drawSkew,
  "affinity-chart": drawAffinity,
  "coactivation-chart": drawCoactivation,
  "information-chart": drawInformation,
  "active-chart": drawActive,
  "convergence-chart": drawConvergence,
  "domains-matrix": (element, colours) => drawDistances(element, colours, DATA.domains, ""),
  "domains-bars": (element, colours) => drawBars(element, colours, DATA.domains),
  "time-matrix": (element, colours) => drawDistances(element, colours, DATA.time, "window "),
  "time-bars": (element, colours) => drawBars(element, colours, DATA.time),
  "predictors-chart": drawPredictors,
};

function chosen(id) {
  return document.getElementById(id).value;
}

// One drawing of a chart at a time, and after it the latest wish alone.
const running = new Map();

async function draw(id) {
  if (running.has(id)) {
    running.set(id, "again");
    return;
  }
  running.set(id, "once");
  const element = document.getElementById(id);
  if (element.dataset.narrow !== String(NARROW.matches)) {
    Plotly.purge(element); // plotly does not turn a colour bar that it has drawn
    element.dataset.narrow = String(NARROW.matches);
  }
  const said = await CHARTS[id](element, readColours());
  const again = running.get(id) === "again";
  running.delete(id);
  if (again) {
    await draw(id);
    return;
  }
  element.setAttribute("aria-label", `${element.dataset.title}. ${said}`);
  const readout = document.getElementById(`${id}-says`);
  if (readout) readout.textContent = said;
  element.dataset.drawn = String(Number(element.dataset.drawn || 0) + 1);
}

const present = Object.keys(CHARTS).filter((id) => document.getElementById(id));

// From the top of the page, with a pause after each, so that it can be read and scrolled meanwhile.
let pending = 0;

async function drawAll() {
  pending += 1;
  for (const id of present) {
    await draw(id);
    await new Promise((resolve) => setTimeout(resolve));
  }
  pending -= 1;
}

for (const select of document.querySelectorAll("select[data-chart]")) {
  select.addEventListener("change", () => draw(select.dataset.chart));
}
DARK.addEventListener("change", drawAll);
NARROW.addEventListener("change", drawAll);
drawAll();
