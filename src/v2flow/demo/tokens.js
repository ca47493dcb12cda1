// The grid of tokens: a click or Enter chooses one, arrow keys move. The grid is one stop of the tab order.
function choose(button) {
  for (const other of element.querySelectorAll('[aria-pressed="true"]')) other.setAttribute('aria-pressed', 'false');
  button.setAttribute('aria-pressed', 'true');
  focusOn(button);
  trigger('click', { index: Number(button.dataset.index) });
}
function focusOn(button) {
  for (const other of element.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
  button.tabIndex = 0;
  button.focus();
}
element.addEventListener('click', (event) => {
  const button = event.target.closest('.tokens button');
  if (button) choose(button);
});
element.addEventListener('keydown', (event) => {
  const button = event.target.closest('.tokens button');
  if (!button) return;
  const columns = Number(button.parentElement.dataset.columns);
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  const next = button.parentElement.children[Number(button.dataset.index) + step];
  if (next) focusOn(next);
});
